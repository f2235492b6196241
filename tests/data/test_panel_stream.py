"""The panel's stream."""

from __future__ import annotations


def test_the_panel_is_the_same_each_time(set_up_data):
    data = set_up_data(panel_attempts=2, panel_seeds=[0, 7], panel_temperature=1.0, stage="validate")
    first, second = ([t for b in data.val_dataloader() for t in b] for _ in range(2))
    assert first == second
    assert [(t.seed, t.task_id, t.member) for t in first] == [(s, f"test-{i:04d}", m) for s in (0, 7) for i in range(3) for m in (0, 1)]
    sampled = {m: [t.token_ids for t in first if t.member == m and t.seed == 0] for m in (0, 1)}
    assert sampled[0] != sampled[1]
    data.rollout.max_rows = 1  # in other pieces, the same
    assert [len(b) for b in data.val_dataloader()] == [4, 4, 4]
    assert [t.token_ids for b in data.val_dataloader() for t in b] == [t.token_ids for t in first]

    greedy = [t for b in set_up_data(stage="validate", seed=3).val_dataloader() for t in b]
    assert greedy == [t for b in set_up_data(stage="validate").val_dataloader() for t in b]  # the run seed has no say in it
