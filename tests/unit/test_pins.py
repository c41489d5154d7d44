"""The env file: one value changes, all else stays, and dotenv reads the new value."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.environment import dotenv
from finetune.errors import MachineError
from finetune.verbs import lock_inputs as pins

SHA = "0123456789" * 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "MODEL_REVISION={}\n"), ("A=1", "A=1\nMODEL_REVISION={}\n"), ("MODEL_REVISION=main", "MODEL_REVISION={}"),
        ("MODEL_REVISION=main # why\nB='x'\n", "MODEL_REVISION={} # why\nB='x'\n"), ("MODEL_REVISION=\n", "MODEL_REVISION={}\n"),
        ('export MODEL_REVISION="a b" \n', 'export MODEL_REVISION="{}" \n'), ("MODEL_REVISION= # none\n", "MODEL_REVISION= {} # none\n"),
        ("MODEL_REVISION\n", "MODEL_REVISION={}\n"), ("# MODEL_REVISION=main\n", "# MODEL_REVISION=main\nMODEL_REVISION={}\n"),
        ("MODEL_REVISION=a\nA=1\nMODEL_REVISION=b\n", "MODEL_REVISION=a\nA=1\nMODEL_REVISION={}\n"),
        ("\n\n# ü\nA=1\r\nMODEL_REVISION='v1'\r\n", "\n\n# ü\nA=1\r\nMODEL_REVISION='{}'\r\n"),
    ],
)  # fmt: skip
def test_one_value_changes(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / ".env"
    path.write_bytes(before.encode())
    pins.write(path, {"MODEL_REVISION": SHA})
    assert path.read_bytes().decode() == after.format(SHA) and dotenv(path)["MODEL_REVISION"] == SHA
    assert [p.name for p in tmp_path.iterdir()] == [".env"]


def test_a_new_file_is_the_users_alone_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / "shared.env")
    pins.write(tmp_path / ".env", {"MODEL_REVISION": SHA, "DATASET_REVISION": SHA})
    assert (tmp_path / ".env").is_symlink() and (tmp_path / "shared.env").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared.env").read_text() == f"MODEL_REVISION={SHA}\nDATASET_REVISION={SHA}\n"


def test_what_cannot_be_written_is_said_with_the_values(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    for path in (tmp_path / ".env", tmp_path / "absent" / ".env"):
        with pytest.raises(MachineError, match=f"cannot be written .* MODEL_REVISION={SHA}"):
            pins.write(path, {"MODEL_REVISION": SHA})
    assert (tmp_path / ".env").read_bytes() == b"A=\xff\n"
