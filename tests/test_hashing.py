"""A hash draws the same everywhere, and another purpose or item something else."""

from skillsd.hashing import hash64, seeded_order


def test_the_order_is_of_the_purpose_and_the_names_alone():
    items = [f"t{i}" for i in range(50)]
    order = seeded_order(items, 7, "order", 0)
    assert seeded_order(reversed(items), 7, "order", 0) == order and sorted(order) == sorted(items)
    others = [seeded_order(items, *purpose) for purpose in ((8, "order", 0), (7, "other", 0), (7, "order", 1))]
    assert all(other != order for other in others)
    assert seeded_order([(1, x) for x in items], 7, "order", 0, name=lambda pair: pair[1]) == [(1, x) for x in order]


def test_a_number_of_64_bits():
    numbers = {hash64(str(i)) for i in range(1000)}
    assert len(numbers) == 1000 and all(-(2**63) <= n < 2**63 for n in numbers) and min(numbers) < 0 < max(numbers)
    assert hash64("a") == 3405396810240292928
