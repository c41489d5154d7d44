"""Import and use each package from which docker/prune.txt takes something. No GPU: what a GPU would run is compiled for one."""

import ast
import ctypes
import importlib.util
import io
import json
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

used = []


def use(function):
    function()
    used.append(function.__name__)


@use
def torch():
    import torch

    x = torch.randn(32, 32, requires_grad=True)
    (x @ x).relu().sum().backward()
    assert torch.linalg.svdvals(x.detach()).isfinite().all()
    assert torch.fft.rfft(x.detach()).shape == (32, 17)
    assert torch.backends.cudnn.version() > 90000 and torch.cuda.nccl.version() >= (2, 27)


@use
def cudnn_opens_adv_for_recurrent_layers_alone():
    import torch

    library = ctypes.CDLL(next(Path(torch.__path__[0]).parent.glob("nvidia/cudnn/lib/libcudnn.so.*")))
    place = ctypes.c_void_p()
    create = library.cudnnCreate(ctypes.byref(place))
    assert create in (0, 1001), create  # 1001: not initialized, for want of a GPU
    assert library.cudnnCreateTensorDescriptor(ctypes.byref(place)) == 0  # libcudnn_ops
    assert library.cudnnCreateConvolutionDescriptor(ctypes.byref(place)) == 0  # libcudnn_cnn
    assert library.cudnnBackendCreateDescriptor(15, ctypes.byref(place)) == 0  # libcudnn_graph: attention
    assert "libcudnn_adv" not in Path("/proc/self/maps").read_text()


@use
def triton():
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def double(pointer, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(pointer + at, tl.load(pointer + at, mask=at < size) * 2, mask=at < size)

    for capability in (75, 80, 90, 100, 120):
        source = ASTSource(triton.JITFunction(double), {"pointer": "*fp32", "size": "i32"}, {"BLOCK": 128})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"][:4] == b"\x7fELF", capability


@use
def launcher():
    # what Triton compiles at run time: its driver in C, against Python.h and the cuda.h that it brings
    import triton

    nvidia = Path(triton.__file__).parent / "backends/nvidia"
    target = Path(tempfile.mkdtemp()) / "launcher.so"
    includes = [f"-I{nvidia / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", *includes, nvidia / "driver.c", "-o", target], check=True)
    subprocess.run(
        ["gcc", "-x", "c", "-", "-o", target.with_suffix("")], input=b"int main(void) { return 0; }", check=True
    )
    assert subprocess.run([target.with_suffix("")]).returncode == 0


@use
def bitsandbytes():
    import bitsandbytes as bnb
    import torch

    weight = torch.randn(64, 64)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert (bnb.functional.dequantize_4bit(packed, state) - weight).abs().mean() < 0.1
    # the library for the GPU is there; its own dependencies too, but for the driver's
    name = f"libbitsandbytes_cuda{torch.version.cuda.replace('.', '')}.so"
    assert (Path(bnb.__file__).parent / name).is_file(), name
    ctypes.CDLL(str(Path(bnb.__file__).parent / name))


@use
def pyarrow():
    import datasets
    import pandas
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.dataset
    import pyarrow.json
    import pyarrow.parquet

    folder = Path(tempfile.mkdtemp())
    table = pa.table({"Question": ["why", "how"], "n": [1, 2]})
    pa.parquet.write_table(table, folder / "t.parquet")
    pa.csv.write_csv(table, folder / "t.csv")
    assert pa.csv.read_csv(folder / "t.csv") == table
    assert pa.dataset.dataset(folder / "t.parquet").to_table() == table
    assert pa.json.read_json(io.BytesIO(b'{"a": 1}\n')).num_rows == 1
    assert datasets.Dataset.from_parquet(str(folder / "t.parquet"), cache_dir=str(folder))["Question"] == ["why", "how"]
    assert pandas.read_parquet(folder / "t.parquet").shape == (2, 2)


@use
def tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    folder = tempfile.mkdtemp()
    with SummaryWriter(folder) as writer:
        writer.add_scalar("loss", 1.5, 1)
    events = EventAccumulator(folder)
    events.Reload()
    assert events.Scalars("loss")[0].value == 1.5


@use
def wandb():
    import wandb

    run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), project="test", settings=wandb.Settings(silent=True))
    run.log({"loss": 1.5})
    run.finish()


@use
def matplotlib():
    import matplotlib.pyplot as plt

    plt.plot([1, 2], [2, 1])
    picture = io.BytesIO()
    plt.savefig(picture, format="png")
    assert picture.getvalue()[:4] == b"\x89PNG"


@use
def torchvision_and_torchao():
    import torch
    import torchao.quantization  # noqa: F401
    import torchvision

    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.4]), 0.5).tolist() == [0]


@use
def sympy_and_networkx():
    import networkx
    import numpy.random
    import sympy
    import sympy.testing.pytest

    x = sympy.Symbol("x")
    assert sympy.integrate(2 * x, x) == x**2
    assert networkx.shortest_path(networkx.path_graph(3), 0, 2) == [0, 1, 2]
    assert numpy.random.default_rng(0).random() < 1


@use
def torch_compiler():
    # up to the code that would run on a GPU: the graph of a compiled function, differentiated
    import torch
    import torch._inductor.compile_fx

    function = torch.compile(lambda x: (x.sin() * 2).sum(), backend="aot_eager")
    x = torch.ones(4, requires_grad=True)
    function(x).backward()
    assert torch.allclose(x.grad, 2 * torch.ones(4).cos())


@use
def trainers():
    from accelerate import Accelerator  # noqa: F401
    from huggingface_hub import HfApi  # noqa: F401
    from peft import LoraConfig, get_peft_model  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401


@use
def unsloth():
    # it imports on a GPU alone, so here its sources are read: no import of what is gone, neither on top nor inside a function
    import cut_cross_entropy  # noqa: F401

    gone = {"diffusers", "hf_transfer", "studio", "unsloth_cli", "tensorboard_data_server", "test"}
    for package in ("unsloth", "unsloth_zoo"):
        folder = Path(importlib.util.find_spec(package).origin).parent
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                found = {name.split(".")[0] for name in names} & gone | {
                    n for n in names if n.startswith("triton.profiler")
                }
                assert not found, (file, found)


print(json.dumps(used), flush=True)
os._exit(0)  # threads of the trackers are of no interest here
