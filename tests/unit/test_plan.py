"""Planning is arithmetic: what is chosen, kept and forecast."""

from __future__ import annotations

import itertools

import pytest

from finetune.training import plan

# 8B in NF4 on the compiled path, in bytes: benchmarks/h100
COST = plan.Cost(
    layers=32, fixed=6.0 * plan.GIB, outside=16_384, kept=140_000, kept_recomputed=8192, work=0.25 * plan.GIB, work_token=60_000,
    loss=0.6 * plan.GIB, loss_token=8192, launch_s=0.2, token_s=6e-5,
)  # fmt: skip
UPDATES = [[900, 1200, 1000, 800, 1100, 950, 1050, 1000], [1700, 600, 700, 900, 1000, 1100, 1200, 800]]


def chosen(gib: float, **given: int) -> plan.Plan:
    return plan.choose(8, UPDATES, COST, gib * plan.GIB, **given)


def test_less_memory_means_more_recomputed_layers_and_then_smaller_pieces() -> None:
    plans = [chosen(gib) for gib in (78, 40, 24, 12, 8)]
    assert [p.micro_batch for p in plans] == sorted((p.micro_batch for p in plans), reverse=True)
    assert plans[0].checkpointing == "none" and plans[0].micro_batch == 8
    assert plans[1].checkpointing == "selective" and 0 < plans[1].recomputed < plans[2].recomputed
    assert plans[-1].micro_batch < 8
    assert all((p.accumulation - 1) * p.micro_batch < 8 <= p.micro_batch * p.accumulation for p in plans)
    assert all(
        p.forecast_gib is not None and p.forecast_gib <= gib for p, gib in zip(plans, (78, 40, 24, 12, 8), strict=True)
    )


def test_no_fewer_pieces_and_no_fewer_recomputed_layers_would_fit() -> None:
    for gib in (40, 24, 12, 9, 8):
        p = chosen(gib)
        if p.recomputed:
            assert COST.peak(p.tokens, p.recomputed - 1) > gib * plan.GIB
        if p.micro_batch < 8:
            fewer = -(-8 // (p.accumulation - 1))
            tokens = max(sum(piece) for update in UPDATES for piece in plan.pieces(update, fewer))
            assert COST.peak(tokens, COST.layers) > gib * plan.GIB


def test_what_the_user_set_is_kept() -> None:
    assert (chosen(78, micro_batch=2).micro_batch, chosen(78, micro_batch=2).accumulation) == (2, 4)
    assert chosen(78, recomputed=32).recomputed == 32
    kept = chosen(1, micro_batch=8, recomputed=0)  # does not fit, and is still what was asked for
    assert (kept.micro_batch, kept.recomputed) == (8, 0)


def test_the_embedding_waits_on_the_host_only_where_that_saves_a_piece() -> None:
    import dataclasses

    cost = dataclasses.replace(COST, movable=1.0 * plan.GIB)
    for gib in (78, 40, 24, 12, 8):
        limit = gib * plan.GIB
        there, moved = chosen(gib), plan.choose(8, UPDATES, cost, limit)
        if moved.embedding_on_host:
            assert moved.accumulation < there.accumulation and moved.forecast_gib is not None
            assert COST.peak(moved.tokens, moved.recomputed) - cost.movable <= limit < COST.peak(moved.tokens, 32)
            assert moved.forecast_gib == pytest.approx(
                (COST.peak(moved.tokens, moved.recomputed)) / plan.GIB - 1, abs=1e-3
            )
        else:
            assert dataclasses.replace(moved, cost=there.cost) == there
    assert [plan.choose(8, UPDATES, cost, gib * plan.GIB).embedding_on_host for gib in (40, 8)] == [False, True]


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    assert (chosen(1).micro_batch, chosen(1).recomputed) == (1, 32)


def test_an_engine_that_cannot_mix_recomputes_all_layers_or_none() -> None:
    import dataclasses

    cost = dataclasses.replace(COST, partial=False, kept_recomputed=0)
    assert {plan.choose(8, UPDATES, cost, gib * plan.GIB).recomputed for gib in range(7, 80)} == {0, 32}


def test_a_model_of_which_nothing_can_be_recomputed_is_planned_for() -> None:
    whole = plan.Cost(**{**vars(COST), "layers": 0, "outside": 4_500_000, "kept": 0.0})
    found = plan.choose(8, UPDATES, whole, 24 * plan.GIB)
    assert (found.micro_batch, found.recomputed, found.checkpointing) == (4, 0, "none")
    assert found.forecast_gib and found.forecast_gib > 4_500_000 * found.tokens / plan.GIB + 6 and found.forecast_step_s


def test_padding_counts() -> None:
    packed, padded = plan.choose(8, UPDATES, COST, 1e15), plan.choose(8, UPDATES, COST, 1e15, padded=True)
    assert (packed.tokens, padded.tokens) == (8000, 8 * 1700)


def test_what_all_rows_begin_with_is_computed_once_a_piece() -> None:
    copied = round(plan.COPIED * 500)
    for size, expected in ((8, 8000 - 7 * 500 + 8 * copied), (4, 4100 - 3 * 500 + 4 * copied), (1, 1700 + copied)):
        assert plan.choose(8, UPDATES, COST, 1e15, shared=500, micro_batch=size).tokens == expected
    whole, once = (plan.choose(8, UPDATES, COST, 24 * plan.GIB, shared=shared) for shared in (0, 500))
    assert once.recomputed < whole.recomputed
    assert once.forecast_step_s is not None and whole.forecast_step_s is not None
    assert once.forecast_step_s < whole.forecast_step_s


def test_the_peak_grows_with_tokens_and_falls_with_recomputed_layers() -> None:
    peaks = [[COST.peak(tokens, count) for count in range(33)] for tokens in (1000, 4000, 9000)]
    assert all(a >= b for row in peaks for a, b in itertools.pairwise(row))
    assert all(a < b for low, high in itertools.pairwise(peaks) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(("size", "expected"), [(3, [3, 3, 2]), (8, [8]), (1, [1] * 8)])
def test_pieces_keep_every_row_in_its_order(size: int, expected: list[int]) -> None:
    found = list(plan.pieces(list(range(8)), size))
    assert [len(piece) for piece in found] == expected
    assert [row for piece in found for row in piece] == list(range(8))
