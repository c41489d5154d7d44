"""The compiled path's tests on a GPU, as it trains there: compiled, in bfloat16, with the real attention kernel."""

from __future__ import annotations

import pytest

from unit.test_compiled import (  # noqa: F401
    folder,
    test_a_row_changes_no_other_row_s_loss,
    test_a_shared_prefix_is_computed_once,
    test_afterwards_the_model_is_what_it_was,
    test_an_embedding_on_the_host_changes_nothing,
    test_an_update_is_the_same_in_any_pieces,
    test_dropout_leaves_each_row_its_own_prefix,
    test_dropout_reaches_the_adapter_alone,
    test_each_row_s_measured_loss_is_that_of_a_float32_reference,
    test_loss_and_gradients_are_those_of_a_float32_reference,
    test_nothing_drops_while_rows_are_measured,
    test_recomputed_layers_give_the_same_gradients,
    test_the_same_bytes_each_time,
    test_weights_dequantized_once_change_nothing,
)
from unit.test_lora_linear import (  # noqa: F401
    test_a_young_adapter_comes_through_as_well_as_with_peft,
    test_it_is_an_operator_as_torch_wants_it,
    test_output_and_gradients_are_peft_s,
)
from unit.test_shared_prefix import test_it_is_indexing_with_its_gradient  # noqa: F401


@pytest.fixture
def device() -> str:
    return "cuda"
