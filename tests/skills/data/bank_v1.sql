BEGIN TRANSACTION;
CREATE TABLE event (
    seq INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, kind TEXT NOT NULL, skill_id INTEGER NOT NULL, reward REAL, gap REAL);
INSERT INTO "event" VALUES(1,0,'insert',1,NULL,NULL);
INSERT INTO "event" VALUES(2,0,'insert',2,NULL,NULL);
INSERT INTO "event" VALUES(3,0,'insert',3,NULL,NULL);
INSERT INTO "event" VALUES(4,1,'insert',4,NULL,NULL);
INSERT INTO "event" VALUES(5,1,'insert',5,NULL,NULL);
INSERT INTO "event" VALUES(6,1,'insert',6,NULL,NULL);
INSERT INTO "event" VALUES(7,1,'drop',6,NULL,NULL);
INSERT INTO "event" VALUES(8,1,'use',1,0.017578125,3.609375);
INSERT INTO "event" VALUES(9,1,'insert',7,NULL,NULL);
INSERT INTO "event" VALUES(10,1,'drop',1,NULL,NULL);
INSERT INTO "event" VALUES(11,1,'merge',7,NULL,NULL);
INSERT INTO "event" VALUES(12,2,'use',4,0.4658203125,-1.140625);
INSERT INTO "event" VALUES(13,2,'insert',8,NULL,NULL);
INSERT INTO "event" VALUES(14,2,'drop',5,NULL,NULL);
INSERT INTO "event" VALUES(15,2,'use',3,0.5791015625,3.5078125);
INSERT INTO "event" VALUES(16,2,'merge',3,NULL,NULL);
INSERT INTO "event" VALUES(17,3,'use',3,0.2412109375,2.0390625);
INSERT INTO "event" VALUES(18,3,'insert',9,NULL,NULL);
INSERT INTO "event" VALUES(19,3,'insert',10,NULL,NULL);
INSERT INTO "event" VALUES(20,3,'drop',3,NULL,NULL);
INSERT INTO "event" VALUES(21,3,'use',8,0.7861328125,0.80859375);
INSERT INTO "event" VALUES(22,3,'merge',4,NULL,NULL);
INSERT INTO "event" VALUES(23,4,'use',8,0.7333984375,0.484375);
INSERT INTO "event" VALUES(24,4,'merge',8,NULL,NULL);
INSERT INTO "event" VALUES(25,4,'merge',4,NULL,NULL);
INSERT INTO "event" VALUES(26,4,'insert',11,NULL,NULL);
INSERT INTO "event" VALUES(27,4,'drop',4,NULL,NULL);
INSERT INTO "event" VALUES(28,4,'use',2,0.978515625,1.95703125);
INSERT INTO "event" VALUES(29,4,'merge',2,NULL,NULL);
INSERT INTO "event" VALUES(30,5,'use',9,0.33984375,-2.5546875);
INSERT INTO "event" VALUES(31,5,'insert',12,NULL,NULL);
INSERT INTO "event" VALUES(32,5,'drop',12,NULL,NULL);
INSERT INTO "event" VALUES(33,5,'insert',13,NULL,NULL);
INSERT INTO "event" VALUES(34,5,'drop',9,NULL,NULL);
INSERT INTO "event" VALUES(35,5,'merge',13,NULL,NULL);
INSERT INTO "event" VALUES(36,5,'use',11,0.91796875,3.375);
INSERT INTO "event" VALUES(37,5,'merge',8,NULL,NULL);
INSERT INTO "event" VALUES(38,5,'merge',8,NULL,NULL);
INSERT INTO "event" VALUES(39,6,'use',11,0.9619140625,3.0546875);
INSERT INTO "event" VALUES(40,6,'merge',11,NULL,NULL);
INSERT INTO "event" VALUES(41,6,'insert',14,NULL,NULL);
INSERT INTO "event" VALUES(42,6,'drop',14,NULL,NULL);
INSERT INTO "event" VALUES(43,6,'use',7,0.69140625,-3.890625);
INSERT INTO "event" VALUES(44,6,'insert',15,NULL,NULL);
INSERT INTO "event" VALUES(45,6,'drop',15,NULL,NULL);
INSERT INTO "event" VALUES(46,6,'insert',16,NULL,NULL);
INSERT INTO "event" VALUES(47,6,'drop',16,NULL,NULL);
INSERT INTO "event" VALUES(48,6,'merge',7,NULL,NULL);
INSERT INTO "event" VALUES(49,7,'use',2,0.064453125,2.828125);
INSERT INTO "event" VALUES(50,7,'insert',17,NULL,NULL);
INSERT INTO "event" VALUES(51,7,'drop',17,NULL,NULL);
INSERT INTO "event" VALUES(52,7,'merge',2,NULL,NULL);
INSERT INTO "event" VALUES(53,7,'insert',18,NULL,NULL);
INSERT INTO "event" VALUES(54,7,'drop',2,NULL,NULL);
INSERT INTO "event" VALUES(55,7,'use',11,0.369140625,-1.1484375);
INSERT INTO "event" VALUES(56,7,'insert',19,NULL,NULL);
INSERT INTO "event" VALUES(57,7,'drop',19,NULL,NULL);
INSERT INTO "event" VALUES(58,7,'insert',20,NULL,NULL);
INSERT INTO "event" VALUES(59,7,'drop',20,NULL,NULL);
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "setting" VALUES('booking','next_visit');
CREATE TABLE skill (
    skill_id INTEGER PRIMARY KEY, task_id TEXT NOT NULL,
    success_analysis TEXT NOT NULL, mistake_analysis TEXT NOT NULL, golden_workflow TEXT NOT NULL,
    source_iteration INTEGER NOT NULL, source_member INTEGER NOT NULL, source_reward REAL NOT NULL, source_completion REAL NOT NULL);
INSERT INTO "skill" VALUES(1,'t1','a worked','a: «too late»','first a,
then ''that''',0,0,0.990234375,0.8984375);
INSERT INTO "skill" VALUES(2,'t1','d worked','d: «too late»','first d,
then ''that''',0,1,0.7587890625,0.4189453125);
INSERT INTO "skill" VALUES(3,'tâche 3','d worked','d: «too late»','first d,
then ''that''',0,0,0.056640625,0.779296875);
INSERT INTO "skill" VALUES(4,'t2','d worked','d: «too late»','first d,
then ''that''',1,0,0.5322265625,0.45703125);
INSERT INTO "skill" VALUES(5,'t2','e worked','e: «too late»','first e,
then ''that''',1,1,0.2041015625,0.634765625);
INSERT INTO "skill" VALUES(6,'t2','a worked','a: «too late»','first a,
then ''that''',1,2,0.0439453125,0.05078125);
INSERT INTO "skill" VALUES(7,'t1','f worked','f: «too late»','first f,
then ''that''',1,0,0.4326171875,0.84375);
INSERT INTO "skill" VALUES(8,'t2','f worked','f: «too late»','first f,
then ''that''',2,0,0.4375,0.9189453125);
INSERT INTO "skill" VALUES(9,'tâche 3','f worked','f: «too late»','first f,
then ''that''',3,0,0.84375,0.37890625);
INSERT INTO "skill" VALUES(10,'tâche 3','c worked','c: «too late»','first c,
then ''that''',3,1,0.5673828125,0.998046875);
INSERT INTO "skill" VALUES(11,'t2','e worked','e: «too late»','first e,
then ''that''',4,2,0.7861328125,0.740234375);
INSERT INTO "skill" VALUES(12,'tâche 3','b worked','b: «too late»','first b,
then ''that''',5,0,0.0244140625,0.3984375);
INSERT INTO "skill" VALUES(13,'tâche 3','e worked','e: «too late»','first e,
then ''that''',5,1,0.4638671875,0.80859375);
INSERT INTO "skill" VALUES(14,'t2','d worked','d: «too late»','first d,
then ''that''',6,1,0.712890625,0.828125);
INSERT INTO "skill" VALUES(15,'t1','e worked','e: «too late»','first e,
then ''that''',6,0,0.662109375,0.916015625);
INSERT INTO "skill" VALUES(16,'t1','e worked','e: «too late»','first e,
then ''that''',6,1,0.0556640625,0.458984375);
INSERT INTO "skill" VALUES(17,'t1','a worked','a: «too late»','first a,
then ''that''',7,0,0.166015625,0.033203125);
INSERT INTO "skill" VALUES(18,'t1','b worked','b: «too late»','first b,
then ''that''',7,2,0.537109375,0.21875);
INSERT INTO "skill" VALUES(19,'t2','a worked','a: «too late»','first a,
then ''that''',7,0,0.333984375,0.318359375);
INSERT INTO "skill" VALUES(20,'t2','c worked','c: «too late»','first c,
then ''that''',7,1,0.3359375,0.544921875);
CREATE INDEX event_iteration ON event (iteration);
COMMIT;
PRAGMA application_id = 1397445444;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
