"""Settings: types, precedence, refusals, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import SettingsError
from finetune.settings import Secret, Settings, declarations, reference, table, text

ROOT = Path(__file__).resolve().parents[2]


def refused(environ: dict[str, str], line: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ, line)
    return str(caught.value)


def test_defaults_are_the_recipe() -> None:
    s = Settings.from_env({})
    assert (s.model_name, s.max_seq_length, s.load_in_4bit) == ("unsloth/DeepSeek-R1-Distill-Llama-8B", 2048, True)
    assert (s.dataset_name, s.dataset_config, s.dataset_split) == (
        "FreedomIntelligence/medical-o1-reasoning-SFT",
        "zh",
        "train[0:500]",
    )
    assert s.prompt_columns + s.completion_columns == ("Question", "Complex_CoT", "Response")
    assert (s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_bias, s.use_rslora) == (16, 16, 0, "none", False)
    assert s.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (s.per_device_train_batch_size, s.gradient_accumulation_steps, s.rows_per_update) == ("auto", "auto", 8)
    assert (s.warmup_steps, s.max_steps, s.learning_rate, s.lr_scheduler_type) == (5, 60, 2e-4, "linear")
    assert (s.optim, s.weight_decay, s.seed, s.logging_steps) == ("adamw_8bit", 0.01, 3407, 10)
    assert (s.gradient_checkpointing, s.dataset_num_proc, s.max_new_tokens) == ("auto", 2, 1200)
    assert s.run_name == "DeepSeek-R1-Medical-COT" and s.full_determinism == "auto"


@pytest.mark.parametrize(
    ("rows", "passes", "micro_batch", "in_all"),
    [("", "", None, 8), ("auto", "AUTO", None, 8), ("3", "", 3, 12), ("", "5", 2, 10), ("2", "4", 2, 8)],
)
def test_what_is_auto_is_planned_and_a_number_is_kept(
    rows: str, passes: str, micro_batch: int | None, in_all: int
) -> None:
    s = Settings.from_env({"PER_DEVICE_TRAIN_BATCH_SIZE": rows, "GRADIENT_ACCUMULATION_STEPS": passes})
    assert (s.micro_batch, s.rows_per_update) == (micro_batch, in_all)


def test_checkpointing_that_is_auto_is_planned() -> None:
    wanted = {"": None, "auto": None, "unsloth": True, "1": True, "true": True, "0": False, "false": False}
    for value, recomputes in wanted.items():
        assert Settings.from_env({"GRADIENT_CHECKPOINTING": value}).recomputes is recomputes


def test_equal_records_are_equal_settings() -> None:
    """What decides stands in the record: passing it on, as `reproduce` does, changes nothing."""
    for given in (
        {},
        {"GRADIENT_CHECKPOINTING": "unsloth"},
        {"PER_DEVICE_TRAIN_BATCH_SIZE": "2"},
        {"FULL_DETERMINISM": "0"},
    ):
        s = Settings.from_env(given)
        again = Settings.from_env({name: text(value) for name, value in s.record().items()})
        assert again.record() == s.record() and again == s
        assert (again.micro_batch, again.recomputes) == (s.micro_batch, s.recomputes)
        assert (s.record() == Settings.from_env({}).record()) == (not given)


@pytest.mark.parametrize("word", ["1", "true", "YES", " on ", '"1"', "'true'"])
def test_true(word: str) -> None:
    assert Settings.from_env({"SAVE_MERGED": word, "OVERWRITE": word}).overwrite is True


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF"])
def test_false(word: str) -> None:
    assert Settings.from_env({"LOAD_IN_4BIT": word}).load_in_4bit is False


def test_empty_means_unset() -> None:
    assert Settings.from_env({"MAX_STEPS": "", "HF_TOKEN": " ", "LOAD_IN_4BIT": '""'}).max_steps == 60


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_STEPS", "0"), ("MAX_STEPS", "-2"), ("MAX_STEPS", "3.5"), ("MAX_STEPS", "1e2"), ("MAX_STEPS", "1_000"),
        ("MAX_STEPS", "３"), ("MAX_STEPS", "3 # three"), ("LEARNING_RATE", "abc"), ("LEARNING_RATE", "0"),
        ("LEARNING_RATE", "nan"), ("LEARNING_RATE", "inf"), ("LEARNING_RATE", "-1e-4"), ("LOAD_IN_4BIT", "maybe"),
        ("LOAD_IN_4BIT", "2"), ("OPTIM", "adam"), ("LORA_DROPOUT", "1"), ("TARGET_MODULES", "q_proj,,v_proj"),
        ("TARGET_MODULES", "q_proj,q_proj"), ("SEED", "-1"), ("DATASET_SPLIT", "train[0-500]"), ("HUB_MODEL_ID", "a/b/c"),
        ("NUM_TRAIN_EPOCHS", "0"), ("ENGINE", "vllm"), ("REPORT_TO", "mlflow"), ("DATASET_NUM_PROC", "0"),
        ("FULL_DETERMINISM", "maybe"), ("GRADIENT_ACCUMULATION_STEPS", "0"), ("PER_DEVICE_TRAIN_BATCH_SIZE", "automatic"),
        ("LORA_R", "auto"),
    ],
)  # fmt: skip
def test_refused_values_name_variable_rule_and_example(name: str, value: str) -> None:
    message = refused({name: value})
    assert message.startswith(f"{name}={value}".split(" #")[0]) and "example" in message


def test_a_rate_that_a_polynomial_cannot_end_below_is_refused() -> None:
    assert "ends at 1e-7" in refused({"LEARNING_RATE": "1e-7", "LR_SCHEDULER_TYPE": "polynomial"})
    Settings.from_env({"LEARNING_RATE": "1e-7"})


def test_everything_wrong_is_shown_at_once() -> None:
    message = refused({"MAX_STEPS": "0", "LEARNING_RATE": "abc", "LOAD_IN_4BIT": "maybe", "MAX_STEP": "3"})
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("MAX_STEP", "MAX_STEPS"), ("LEARNINGRATE", "LEARNING_RATE"), ("max_steps", "MAX_STEPS"), ("LORA_RANK", "LORA_R"),
        ("BATCH_SIZE", "PER_DEVICE_TRAIN_BATCH_SIZE"), ("EPOCHS", "NUM_TRAIN_EPOCHS"), ("TARGET_MODULE", "TARGET_MODULES"),
        ("MAX_STPES", "MAX_STEPS"), ("HF_TOKN", "HF_TOKEN"), ("HUGGINGFACE_TOKEN", "HF_TOKEN"), ("OUTPUTDIR", "OUTPUT_DIR"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_and_name_the_right_one(wrong: str, right: str) -> None:
    assert f"did you mean {right}?" in refused({wrong: "hf_secret"})


def test_a_near_miss_of_a_secret_does_not_print_it() -> None:
    assert "hf_abc" not in refused({"HF_TOKN": "hf_abc", "HUGGINGFACE_TOKEN": "hf_abc"})


def test_foreign_variables_are_left_alone() -> None:
    foreign = ["PATH", "HOME", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "WANDB_API_KEY_OTHER", "SEEDS_OF_TIME", "LANG", "KUBERNETES_PORT", "TRAIN_PORT_80_TCP", "NVIDIA_VISIBLE_DEVICES", "HF_TOKEN_PATH", "UNSLOTH_ENV"]  # fmt: skip
    Settings.from_env(dict.fromkeys(foreign, "x"))


def test_unknown_names_on_the_command_line_are_refused() -> None:
    assert "no such setting" in refused({}, {"FOO": "1"})
    assert "did you mean MAX_STEPS?" in refused({}, {"--max_steps": "3"})
    assert "HF_ENDPOINT: is a variable of the libraries" in refused({}, {"HF_ENDPOINT": "http://127.0.0.1"})


def test_the_command_line_wins() -> None:
    assert Settings.from_env({"MAX_STEPS": "5"}, {"MAX_STEPS": "7"}).max_steps == 7


def test_epochs_alone_make_a_full_run_and_steps_win_over_them() -> None:
    assert Settings.from_env({"NUM_TRAIN_EPOCHS": "1"}).max_steps == -1
    assert Settings.from_env({"NUM_TRAIN_EPOCHS": "1", "MAX_STEPS": "9"}).max_steps == 9
    assert "NUM_TRAIN_EPOCHS" in refused({"MAX_STEPS": "-1"})


def test_another_data_set_does_not_inherit_configuration_and_slice() -> None:
    s = Settings.from_env({"DATASET_NAME": "rows.jsonl"})
    assert (s.dataset_config, s.dataset_split) == (None, "train")
    same = Settings.from_env({"DATASET_NAME": "FreedomIntelligence/medical-o1-reasoning-SFT"})
    assert (same.dataset_config, same.dataset_split) == ("zh", "train[0:500]")


def test_secret_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_abc\n")
    s = Settings.from_env({"HF_TOKEN_FILE": str(tmp_path / "token")})
    assert s.hf_token is not None and s.hf_token.reveal() == "hf_abc"
    assert "keep one" in refused({"HF_TOKEN": "x", "HF_TOKEN_FILE": str(tmp_path / "token")})
    assert "cannot be read" in refused({"HF_TOKEN_FILE": str(tmp_path / "absent")})
    (tmp_path / "empty").write_text("\n")
    assert "empty" in refused({"HF_TOKEN_FILE": str(tmp_path / "empty")})


def test_secrets_never_show() -> None:
    s = Settings.from_env({"HF_TOKEN": "hf_abc", "WANDB_API_KEY": "key"})
    shown = repr(s) + str(s.record()) + str(s.deciding()) + repr(Secret("hf_abc"))
    assert "hf_abc" not in shown and "'key'" not in shown and "HF_TOKEN" not in s.record()
    assert "hf_abc" not in refused({}, {"HF_TOKEN": "hf_abc"})
    assert "hf_a" not in refused({"HF_TOKEN": "hf_a b"}) + refused({"HF_TOKEN": "hf_a\udcff"})


def test_a_push_needs_name_and_token_before_anything_else() -> None:
    message = refused({"PUSH_TO_HUB": "1", "SAVE_ADAPTER": "0"})
    assert "HUB_MODEL_ID=" in message and "HF_TOKEN" in message and "SAVE_ADAPTER" in message
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({}, {"MAX_STEPS": "0"}, publishes=True)
    assert len(caught.value.problems) == 3 and not any("PUSH_TO_HUB" in problem for problem in caught.value.problems)
    there = {"SAVE_ADAPTER": "0", "HUB_MODEL_ID": "you/out", "HF_TOKEN": "x"}  # `push` publishes what a run has left
    assert not Settings.from_env(there, publishes=True).save_adapter


def test_every_default_passes_its_own_check() -> None:
    written = {d.name: d.shown_default() for d in declarations() if d.shown_default()}
    assert Settings.from_env(written).record() == Settings.from_env({}).record()


def test_env_example_and_readme_are_generated() -> None:
    assert (ROOT / "env.example").read_text() == reference(), "run: make env-example"
    assert table() in (ROOT / "README.md").read_text(), "run: make env-example"
