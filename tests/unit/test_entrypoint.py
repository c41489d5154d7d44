"""The entrypoint as a program: speed, exit codes, what it imports."""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import entrypoint
from finetune.errors import Refusal, SettingsError
from finetune.settings import Settings
from finetune.verbs import table

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "unsloth", "datasets", "huggingface_hub", "trl", "peft", "numpy")


def call(*words: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp")}
    command = [sys.executable, str(ROOT / "entrypoint.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environ}, cwd=cwd, timeout=60)


@pytest.mark.parametrize(
    "words", [["--help"], ["env"], ["train", "MAX_STEPS=0"], ["check"], ["FOO=1"], ["reproduce", "absent.json"]]
)
def test_light_verbs_import_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import entrypoint\n"
        f"entrypoint.main({words!r}, {{'PATH': '/nonexistent', 'HOME': '/tmp'}})\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr


@pytest.mark.parametrize("words", [["--help"], ["env"], ["train", "MAX_STEPS=0"]])
def test_light_verbs_answer_in_a_fifth_of_a_second(words: list[str]) -> None:
    """Of a core's time, so that other work on the machine does not count: waiting for the clock is all that is left out."""

    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    seconds = []
    for _ in range(5):
        began = used()
        call(*words)
        seconds.append(used() - began)
    assert statistics.median(seconds) < 0.2, seconds


def test_no_gpu_refuses_the_8b_model_with_the_ways_out() -> None:
    answer = call(PATH="/usr/bin:/bin", CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 3
    for way in ("docker run --gpus all", "make smoke", "ENGINE=transformers"):
        assert way in answer.stderr


def test_engine_unsloth_without_a_gpu(tmp_path: Path) -> None:
    answer = call("ENGINE=unsloth", f"OUTPUT_DIR={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 3 and "ENGINE=transformers" in answer.stderr


def test_settings_errors_are_exit_code_2() -> None:
    answer = call("train", "MAX_STEPS=0", LEARNING_RATE="abc")
    assert answer.returncode == 2 and answer.stderr.count("error: ") == 2 and answer.stdout == ""


def test_precedence_of_line_environment_and_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_STEPS=0 # a comment\nLEARNING_RATE='abc'\nSEED=x\n")
    answer = call("check", "SEED=y", cwd=tmp_path, LEARNING_RATE="def", LORA_R="")
    assert "MAX_STEPS=0" in answer.stderr and "LEARNING_RATE=def" in answer.stderr and "SEED=y" in answer.stderr


def test_an_unwritable_output_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = call("check", f"OUTPUT_DIR={tmp_path}/file/inside", "MODEL_NAME=org/tiny-100M")
    assert answer.returncode == 3 and "OUTPUT_DIR" in answer.stderr and "cannot be written" in answer.stderr


@pytest.mark.parametrize("verb", ["train", "check"])
def test_all_that_is_not_there_is_named_at_once_and_before_anything_is_loaded(verb: str, tmp_path: Path) -> None:
    wrong = dict(
        MODEL_NAME="/absent", DATASET_NAME="/absent.jsonl", PROMPT_TEMPLATE=str(tmp_path / "absent.txt"), OUTPUT_DIR="/proc/out",
        ENGINE="unsloth",
    )  # fmt: skip
    answer = call(verb, *(f"{name}={value}" for name, value in wrong.items()))
    assert answer.returncode == 2
    assert all(any(name in line for line in answer.stderr.splitlines()) for name in wrong), answer.stderr


def test_a_template_with_too_few_places_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("Question: {}")
    answer = call(
        "train", "MODEL_NAME=org/absent-100M", "DATASET_NAME=samples", f"PROMPT_TEMPLATE={tmp_path}/template.txt"
    )
    assert answer.returncode == 2 and "has 1 places {} for 3 columns" in answer.stderr


def test_values_that_are_no_utf_8_or_no_numbers_are_refused_at_the_start() -> None:
    wrong = dict(RUN_NAME="\udcd6\udcd0", HEALTH_TIMEOUT="1e999", LORA_ALPHA="9" * 5000, SEED="5000000000")
    answer = call("check", *(f"{name}={value}" for name, value in wrong.items()))
    assert answer.returncode == 2 and "from 0 to 4294967295" in answer.stderr
    assert all(f"error: {name}=" in answer.stderr for name in wrong) and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"RUN_NAME=\xd6\xd0\n", "not UTF-8 at byte 9"), (b'MAX_STEPS: 3\nSEED=1\nRUN_NAME="a\n', "in line 1, 3"), (b"RUN_NAME=a\0b\n", "in line 1;")],
)  # fmt: skip
def test_a_line_of_the_env_file_that_means_nothing_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / ".env").write_bytes(content)
    answer = call("check", cwd=tmp_path)
    assert answer.returncode == 2 and words in answer.stderr and "Traceback" not in answer.stderr


def test_a_reader_that_leaves_and_a_terminal_without_such_letters_are_no_crash() -> None:
    command = f"{sys.executable} {ROOT}/entrypoint.py env"
    left = subprocess.run(
        ["bash", "-c", f"{command} | sleep 0.01; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert left.returncode in (0, 141) and "Traceback" not in left.stderr
    plain = call("env", PYTHONIOENCODING="ascii")
    assert plain.returncode == 0 and "\\u" in plain.stdout


def test_words_that_are_no_settings() -> None:
    assert call("train", "steps", "3").returncode == 2
    assert "did you mean MAX_STEPS" in call("--max-steps=3").stderr
    assert call("ask").returncode == 2


def test_anything_else_is_run_as_a_command() -> None:
    answer = call("sh", "-c", "echo $HELLO; exit 7", HELLO="you")
    assert (answer.stdout, answer.returncode) == ("you\n", 7)
    missing = call("no-such-command")
    assert missing.returncode == 127 and "verb" in missing.stderr
    empty = call("")  # docker run IMAGE "$COMMAND", where nobody set it
    assert empty.returncode == 127 and "an empty word" in empty.stderr and "Traceback" not in empty.stderr


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("trian", "did you mean train?"), ("chekc", "did you mean check?"), ("max_steps", "for example MAX_STEPS=…"), ("learning_rat", "the setting LEARNING_RATE=…"), ("zzz", "the verbs are train, check")],
)  # fmt: skip
def test_a_slip_is_answered_with_what_was_meant(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.execute([word], {"PATH": "/nonexistent"}) == 127
    assert f"error: {word}: neither a verb nor a command" in (said := capsys.readouterr().err) and sentence in said


def test_a_setting_with_two_slips_is_answered_too() -> None:
    with pytest.raises(SettingsError, match="LERNING_RATES: there is no such setting; did you mean LEARNING_RATE"):
        Settings.from_env({}, {"LERNING_RATES": "1"})


def test_a_token_file_of_another_user_is_refused_with_both_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (token := tmp_path / "token").write_text("hf_secret")
    token.chmod(0o600)
    me = os.getuid()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    monkeypatch.setattr("os.getuid", lambda: 1000)
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"HF_TOKEN_FILE": str(token)})
    said = str(caught.value)
    assert f"belongs to user {me} with mode 0600, and this is user 1000" in said and "docker run --user" in said
    assert "hf_secret" not in said


def test_a_verb_is_named_once(tmp_path: Path) -> None:
    """Usage, README, make and the files beside the table all know the verbs of the table, and no others."""
    shown = call("--help").stdout
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    files = {path.stem for path in (ROOT / "finetune" / "verbs").glob("*.py")} - {"__init__", "table"}
    assert files == {verb.module.rpartition(".")[2] for verb in table.VERBS.values()}
    assert table.readme() in readme, "run: make env-example"
    for verb in table.VERBS.values():
        assert re.search(rf"^  {re.escape(verb.typed)} +{re.escape(verb.help)}$", shown, re.MULTILINE)
        target = (verb.name if verb.make is None else verb.make).split(" ")[0]
        if target:
            rule = rf"^{target}: main ## {re.escape(verb.help)}(: make .*)?\n\t@\$\(PYTHON_RUN\) entrypoint.py {verb.name}\b"
            assert re.search(rule, makefile, re.MULTILINE), target
    classes = {c.code for c in Refusal.__subclasses__()} | {0}
    assert {int(code) for code in table.EXIT_CODES if code.isdigit() and int(code) < 128} == classes
    listed = readme[readme.index("Exit codes: ") :].partition("\n\n")[0].replace("\n", " ")
    chinese = (ROOT / "README.zh-CN.md").read_text().partition("退出码：")[2].partition("\n\n")[0]
    for code, meaning in table.EXIT_CODES.items():
        assert f"{code} {meaning}" in listed.replace(" (everything stays on disk)", "")
        assert all(f"{number} " in chinese or f"{number}、" in chinese for number in re.findall(r"\d+", code))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ("train", "", {})),
        (["MAX_STEPS=3"], ("train", "", {"MAX_STEPS": "3"})),
        (["verify"], ("verify", "", {})),
        (["verify", "out/a=b", "SEED=1"], ("verify", "out/a=b", {"OUTPUT_DIR": "out/a=b", "SEED": "1"})),
        (["verify", "OUTPUT_DIR=out"], ("verify", "", {"OUTPUT_DIR": "out"})),
        (["ask", "a = b?", "SEED=1"], ("ask", "a = b?", {"SEED": "1"})),
        (["push"], ("push", "", {})),
        (["reproduce", "run.json"], ("reproduce", "run.json", {})),
    ],
)
def test_what_is_typed(words: list[str], found: tuple[str, str, dict[str, str]]) -> None:
    made = table.parse(words)
    assert (made.verb.name, made.word, made.line) == found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ask"], "ask: needs QUESTION, for example: ask 'What"),
        (["reproduce", "SEED=1"], "reproduce: needs RUN_JSON, for"),
        (["verify", ""], "an empty word: not understood; settings are given"),
    ],
)
def test_a_word_that_is_missing_is_named_with_an_example(words: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        table.parse(words)
    assert str(caught.value).startswith(sentence)


def test_push_needs_what_publishing_needs_and_sets_nothing(tmp_path: Path) -> None:
    answer = call("push", f"OUTPUT_DIR={tmp_path}")
    assert answer.returncode == 2 and "HUB_MODEL_ID" in answer.stderr and "PUSH_TO_HUB" not in answer.stderr
    empty = call("push", f"OUTPUT_DIR={tmp_path}", "HUB_MODEL_ID=a/b", HF_TOKEN="x", HF_HUB_OFFLINE="1")
    assert empty.returncode == 4 and "HF_HUB_OFFLINE=1: publishing needs the Hub" in empty.stderr, empty.stderr


@pytest.mark.parametrize("verb", ["verify", "ask"])
def test_a_folder_without_a_run_has_its_own_exit_code(verb: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        answer = call(verb, *(["What?"] if verb == "ask" else []), f"OUTPUT_DIR={place}")
        assert answer.returncode == 5 and "holds no finished run" in answer.stderr, answer.stderr


def test_env_prints_the_reference() -> None:
    assert call("env").stdout == (ROOT / "env.example").read_text()
