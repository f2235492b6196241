"""Files that survive a kill: whole writes and checksums (durable), checkpoints, the run folder, its lock, and how a run starts in it."""
