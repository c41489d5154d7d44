"""What all rows begin with: where tokens and keys lie, and the operator that copies them."""

from __future__ import annotations

import torch

from finetune.engines.compiled import shared_prefix


def test_each_row_sees_the_shared_prefix_and_itself() -> None:
    tokens = [*"ab", *"cd", *"e", *"fgh"]  # abcd, abe, abfgh
    where = shared_prefix.layout([4, 3, 5], shared=2, max_rows=4)
    assert where.cu_seqlens.tolist() == [0, 2, 4, 5, 8, 8]
    assert where.cu_seqlens_k.tolist() == [0, 2, 6, 9, 14, 14]
    assert "".join(tokens[key] for key in where.keys) == "ab" + "abcd" + "abe" + "abfgh"
    assert where.keys[where.copies].tolist() == [[0, 1]] * 4
    assert where.keys[where.rests].tolist() == [2, 3, 4, 5, 6, 7]


def test_without_a_shared_prefix_keys_are_the_tokens() -> None:
    where = shared_prefix.layout([2, 3], shared=0, max_rows=2)
    assert where.keys.tolist() == where.rests.tolist() == list(range(5))
    assert where.cu_seqlens.tolist() == where.cu_seqlens_k.tolist() == [0, 0, 2, 5]


def test_it_is_indexing_with_its_gradient(device: str) -> None:
    index = [torch.from_numpy(array).to(device) for array in shared_prefix.layout([9, 7, 12], 5, max_rows=3)[2:]]
    found, expected = (torch.randn(18, 2, 4, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected.data = found.data.clone()
    weights = torch.randn(len(index[0]), 2, 4, device=device, dtype=torch.float64)
    (torch.ops.finetune.shared_prefix(found, *index) * weights).sum().backward()
    (expected[index[0]] * weights).sum().backward()
    assert found.grad is not None and expected.grad is not None
    assert torch.allclose(found.grad, expected.grad)
    with torch.no_grad():
        copies = torch.ops.finetune.shared_prefix(found, *index)
    assert torch.equal(copies, found.detach()[index[0]])
    torch.library.opcheck(torch.ops.finetune.shared_prefix.default, (found, *index))
    torch.library.opcheck(torch.ops.finetune.shared_prefix_backward.default, (copies, *index[1:]))


def test_it_is_compiled_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from finetune.engines.compiled.path import _any_length

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)  # type: ignore[untyped-decorator]
    def doubled(states: torch.Tensor, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return 2 * torch.ops.finetune.shared_prefix(states, *index)

    for sizes in ([9, 7, 12], [20, 8, 30], [50, 60], [11, 9, 40, 41]):
        where = shared_prefix.layout(sizes, shared=5, max_rows=4)
        states = torch.randn(int(where.cu_seqlens[-1]), 2, 4, requires_grad=True)
        index = [torch.from_numpy(array) for array in where[2:]]
        marked = tuple(_any_length(tensor, *range(tensor.dim())) for tensor in index)
        doubled(_any_length(states, 0), marked).sum().backward()
    assert counter.frame_count == 1
