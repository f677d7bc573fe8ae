"""
The peak table: each card gets its own peak and no other card's, and what cannot be known is not made up.
Memory: the estimate is what is there. References: datasheet figures written by hand; what autograd and
torch's partitioner keep.
Run: pytest tests/test_hardware.py
"""

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from functorch.compile import aot_module_simplified, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from configurator import configure
from model import GPT, GPTConfig, make_gpt
from sologpt import hardware, memory
from sologpt.errors import UserError
from sologpt.hardware import PEAKS, peak_flops
from sologpt.layers import cast_weights, linear_layers
from train import TrainConfig, prepare_model


def tflops(name, sm_count, dtype="bfloat16"):
    peak, phrase = peak_flops(name, sm_count, dtype)
    assert name in phrase
    return peak and round(peak / 1e12, 1)


@pytest.mark.parametrize(
    "name, sm_count, expected",
    [
        ("NVIDIA GeForce RTX 4070", 46, 58.3),
        ("NVIDIA H100 80GB HBM3", 132, 989.4),
        ("NVIDIA H100 PCIe", 114, 756.4),
        ("NVIDIA H100 80GB HBM2e", 114, 756.4),
        ("NVIDIA H100 NVL", 132, 835.5),
        ("NVIDIA H200", 132, 989.4),
        ("NVIDIA H200 NVL", 132, 835.5),
        ("NVIDIA A100-SXM4-80GB", 108, 312.0),
        ("A100-PCIE-40GB", 108, 312.0),
        ("NVIDIA A100 80GB PCIe", 108, 312.0),
        ("NVIDIA GeForce RTX 3060", 28, 25.5),
        ("GeForce RTX 3090", 82, 71.2),
        ("NVIDIA B300 SXM6 AC", 148, 2250.0),
        ("AMD Instinct MI300X", 304, 1307.4),
        ("AMD Instinct MI300X OAM", 304, 1307.4),
    ],
)
def test_a_card_has_its_datasheet_peak(name, sm_count, expected):
    assert tflops(name, sm_count) == expected


@pytest.mark.parametrize(
    "name, sm_count, expected, not_the_peak_of",
    [
        ("NVIDIA RTX A1000", 18, None, "a100"),
        ("NVIDIA RTX A4000", 48, 76.7, "a40"),
        ("NVIDIA RTX A3000", 32, None, "a30"),
        ("NVIDIA A100-SXM4-40GB", 108, 312.0, "a10"),
        ("NVIDIA A10G", 80, 70.0, "a10"),
        ("NVIDIA RTX A2000 12GB", 26, 31.9, "a2"),
        ("NVIDIA A16", 10, 18.0, "a10"),
        ("NVIDIA L40", 142, 181.0, "l4"),
        ("NVIDIA L40S", 142, 366.4, "l40"),
        ("NVIDIA T400", 6, None, "tesla t4"),
        ("NVIDIA H200", 132, 989.4, "h20"),
        ("NVIDIA H20-3e", 78, 148.0, "h200"),
        ("NVIDIA GH200 480GB", 132, 989.4, "h200"),
        ("NVIDIA GB200", 152, 2500.0, "b200"),
        ("NVIDIA GB300", 152, None, "b300"),
        ("NVIDIA GeForce RTX 4090 D", 114, 147.1, "rtx 4090"),
        ("NVIDIA GeForce RTX 5090 D", 170, None, "rtx 5090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, None, "rtx 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", 84, 80.0, "rtx 3090"),
        ("NVIDIA GeForce RTX 4070 SUPER", 56, 71.0, "rtx 4070"),
        ("NVIDIA GeForce RTX 4070 Ti", 60, 80.2, "rtx 4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 66, 88.2, "rtx 4070 ti"),
        ("NVIDIA RTX 6000 Ada Generation", 142, 364.2, "quadro rtx 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, 503.8, "rtx 6000 ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 188, 438.9, "rtx 6000 ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, None, "rtx 6000 ada"),
        ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", 70, None, "rtx pro 4000 blackwell"),
        ("NVIDIA GeForce RTX 2060 SUPER", 34, None, "rtx 2060"),
        ("NVIDIA RTX 5000 Ada Generation", 100, 261.1, "quadro rtx 5000"),
        ("NVIDIA RTX PRO 5000 Blackwell", 110, None, "rtx 5000 ada"),
        ("AMD Instinct MI300A", 228, 980.6, "mi300x"),
    ],
)
def test_a_name_that_contains_another_cards_name_is_told_apart(name, sm_count, expected, not_the_peak_of):
    assert tflops(name, sm_count) == expected
    assert not_the_peak_of in {row[0] for row in PEAKS}


@pytest.mark.parametrize(
    "name, sm_count, dtype, expected",
    [
        ("Quadro RTX 6000", 72, "float16", 130.5),
        ("Quadro RTX 5000", 48, "float16", 89.2),
        ("Tesla T4", 40, "float16", 65.1),
        ("Tesla T4", 40, "float32", 8.1),
        ("Tesla T4", 40, "bfloat16", None),
        ("Tesla V100-SXM2-32GB", 80, "float16", 125.0),
        ("Tesla V100-PCIE-16GB", 80, "float16", 112.0),
        ("Tesla V100-SXM3-32GB", 80, "float16", None),
        ("NVIDIA A100-SXM4-40GB", 108, "float32", 156.0),
        ("NVIDIA GeForce RTX 4070", 46, "float32", 29.1),
        ("AMD Instinct MI355X", 256, "float32", 157.3),
    ],
)
def test_each_dtype_has_its_own_peak(name, sm_count, dtype, expected):
    assert tflops(name, sm_count, dtype) == expected


def test_a_part_of_a_gpu_has_that_part_of_its_peak():
    peak, phrase = peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 14, "bfloat16")
    assert peak == pytest.approx(312e12 * 14 / 108) and "14 of 108 SMs" in phrase
    assert tflops("GRID A100-10C", 27) == 78.0


def test_more_sms_than_the_row_has_are_another_card_and_an_estimate_is_called_one():
    assert tflops("NVIDIA GeForce RTX 2060", 34, "float16") is None  # the 12 GB card
    assert peak_flops("NVIDIA GB10", 48, "bfloat16")[1].endswith(", an estimate")


def test_cards_that_share_a_name_are_told_apart_by_their_sms():
    assert (tflops("NVIDIA GeForce RTX 3080", 68), tflops("NVIDIA GeForce RTX 3080", 70)) == (59.5, 61.3)
    assert (tflops("NVIDIA GeForce RTX 3050", 20), tflops("NVIDIA GeForce RTX 3050", 18)) == (18.2, 13.5)
    assert (tflops("AMD Instinct MI250X/MI250", 110), tflops("AMD Instinct MI250X/MI250", 104)) == (
        191.5,
        181.0,
    )


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1080",
        "Quadro RTX 5000 with Max-Q Design",
        "",
        "Orin",
        "NVIDIA RTX A2000 Embedded GPU",
    ],
)
def test_an_unknown_card_has_no_peak(name):
    assert peak_flops(name, 20, "float16")[0] is None


def test_rows_that_state_their_arithmetic_agree_with_it():
    source, checked = Path(hardware.__file__).read_text(), 0
    for line in source.splitlines():
        stated = re.search(r"\b(\d+)x(512|1024)x(\d\.\d+)", line)
        if stated and line.strip().startswith("("):
            sms, rate, ghz = int(stated[1]), int(stated[2]), float(stated[3])
            row = re.match(r'\s*\("[^"]+", (\d+), ([\d.]+), ([\d.]+)', line)
            assert int(row[1]) == sms and float(row[3]) == pytest.approx(sms * rate * ghz / 1000, rel=0.01), (
                line
            )
            checked += 1
    assert checked > 20


def test_ampere_and_later_do_half_the_rate_in_tf32():
    for name, _, bf16, fp16, tf32, _ in PEAKS:
        if bf16 and not name.startswith("mi"):
            assert bf16 == fp16 and tf32 == pytest.approx(bf16 / 2, rel=0.03), name


def test_cpu_is_chosen_without_a_gpu_and_what_is_not_there_is_refused(monkeypatch):
    if torch.cuda.is_available():
        assert hardware.pick_device("")[0].type == "cuda"
    else:
        with pytest.raises(ValueError, match=r"torch sees 0 GPUs.*leave --device out"):
            hardware.pick_device("cuda")
    cpu, why = hardware.pick_device("cpu")
    assert cpu == torch.device("cpu") and why == "as asked"
    for wrong in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ValueError, match="use cuda, cuda:N, mps or cpu"):
            hardware.pick_device(wrong)
    assert hardware.pick_dtype("", cpu)[0] == "float32"
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert hardware.pick_dtype("bfloat16", cpu) == ("bfloat16", "as asked")
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    dtype, reason = hardware.pick_dtype("bfloat16", cpu)
    assert dtype == "bfloat16" and "float32 is many times faster" in reason
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        hardware.pick_dtype("float16", cpu)
    assert hardware.device_peak(cpu, "float32") == (None, "no peak is known for cpu")


def test_an_apple_gpu_computes_in_fp32_unless_asked_and_is_asked_nothing_of_cuda():
    mps = torch.device("mps")  # a name; the machine need not have one
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="torch sees no Apple GPU"):
            hardware.pick_device("mps")
    assert hardware.pick_dtype("", mps) == ("float32", "the default on mps")
    assert hardware.pick_dtype("bfloat16", mps) == ("bfloat16", "as asked")
    with pytest.raises(UserError, match="needs a CUDA GPU, this is mps"):
        hardware.pick_dtype("float16", mps)
    assert hardware.device_peak(mps, "float32") == (None, "no peak is known for mps")
    assert hardware.device_name(mps) == "mps" and hardware.compile_obstacle(mps) is None
    for memory_of in (hardware.available_memory, hardware.total_memory, hardware.peak_memory):
        assert memory_of(mps) is None


@pytest.mark.parametrize(
    "groups, files, limits",
    [
        # version 2: the group's own limit, that of one above it, and none of the root's
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "3000"}, [3000]),
        ("0::/\n", {"memory.max": "5000\n"}, [5000]),  # in a container
        ("0::/gone\n", {}, []),
        ("no such thing\n0::/\udcff\n", {}, []),
        # version 1, beside other controllers
        (
            "5:cpu,cpuacct:/c\n4:memory:/a\n0::/\n",
            {"memory/a/memory.limit_in_bytes": "7000", "memory/memory.limit_in_bytes": "9000"},
            [7000, 9000],
        ),
    ],
)
def test_limits_of_containers_are_seen(tmp_path, groups, files, limits):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups, errors="surrogateescape")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert hardware.group_limits(tmp_path) == limits
    assert hardware.group_limits(tmp_path / "elsewhere") == []


def test_a_computer_has_no_more_than_its_group_may_use(monkeypatch):
    whole = hardware.total_memory(torch.device("cpu"))
    monkeypatch.setattr(hardware, "group_limits", lambda: [whole // 3, whole // 2])
    assert hardware.total_memory(torch.device("cpu")) == whole // 3


@pytest.mark.parametrize(
    "has_bf16, expected",
    [
        (True, ("bfloat16", "this GPU has bf16")),
        (False, ("float16", "this GPU has no bf16; fp16 with loss scaling")),
    ],
)
def test_a_gpu_computes_in_bf16_if_it_can_and_in_fp16_else(monkeypatch, has_bf16, expected):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert hardware.pick_dtype("", cuda) == expected
    assert hardware.pick_dtype("float16", cuda) == ("float16", "as asked")
    if not has_bf16:
        with pytest.raises(ValueError, match="GeForce has no bf16; use float16"):
            hardware.pick_dtype("bfloat16", cuda)


def test_what_compile_lacks_is_named(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    (tmp_path / "g++").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.compile_obstacle(cpu, tmp_path) is None
    assert re.search(
        r"no Python\.h \(apt install python3\.\d+-dev\)", hardware.compile_obstacle(cpu, tmp_path / "none")
    )
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert "g++ is not on the PATH (apt install g++)" in hardware.compile_obstacle(cpu, tmp_path)
    assert "gcc or clang is not on the PATH" in hardware.compile_obstacle(torch.device("cuda"), tmp_path)


def test_windows_without_triton_trains_uncompiled_and_says_why(monkeypatch, capsys):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert "pip install triton-windows" in hardware.windows_obstacle(cuda)
    assert "cl of Visual Studio's Build Tools" in hardware.windows_obstacle(cpu)
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    cfg = configure(TrainConfig, ["--device=cpu"])
    hardware.find_machine(cfg)
    assert not cfg.compile and capsys.readouterr().err.count("going on without torch.compile") == 1
    cfg = configure(TrainConfig, ["--device=cpu", "--activation_memory=0.8"])
    with pytest.raises(UserError, match="activation_memory=0.8 needs torch.compile"):
        hardware.find_machine(cfg)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    assert hardware.windows_obstacle(cuda) is None and hardware.windows_obstacle(cpu) is None


BATCH = 16
SIZES = dict(block_size=256, vocab_size=2048, n_layer=2, n_head=2, n_embd=128, bias=False)


def one_pass(model, dtype):
    idx = torch.zeros(BATCH, 256, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model(idx, idx)


def kept_by_autograd(model, dtype):
    """Bytes that autograd keeps for the backward pass, weights left out."""
    weights = [*model.parameters(), *(layer.weight16 for layer in linear_layers(model))]
    weights = {p.untyped_storage().data_ptr() for p in weights if p is not None}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no other gets its address
        return tensor.detach()  # an operation that keeps its own output would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one_pass(model, dtype)
    return sum(storage.nbytes() for storage in kept.values())


def weights_in_16_bits(model):
    return sum(layer.weight16.nbytes for layer in linear_layers(model))


class Counted(Exception):
    pass


def kept_by_the_compiler(model, dtype):
    """The same of the graph that torch.compile's partitioner makes, as inductor calls it. Nothing is run."""
    kept = []

    def partition(graph, inputs, *, num_fwd_outputs, **options):
        forward, _ = min_cut_rematerialization_partition(
            graph, inputs, num_fwd_outputs=num_fwd_outputs, **options
        )
        [output] = [node for node in forward.graph.nodes if node.op == "output"]
        for node in output.args[0][num_fwd_outputs:]:
            value = node.meta.get("val") if node.op != "placeholder" else None  # inputs are there anyway
            kept.append(value.numel() * value.itemsize if torch.is_tensor(value) else 0)
        raise Counted

    def backend(graph, inputs):
        return aot_module_simplified(
            graph, inputs, fw_compiler=None, partition_fn=partition, decompositions=select_decomp_table()
        )

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Counted"):
        one_pass(torch.compile(model, backend=backend, dynamic=False), dtype)
    return sum(kept)


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_estimate_has_the_scores_that_autograd_keeps_for_dropout_on_a_cpu(arch, dtype):
    kept, estimates = [], []
    for dropout in (0.0, 0.1):
        model = make_gpt(GPTConfig(**SIZES | dict(n_head=8, dropout=dropout), arch=arch)).train()
        cast_weights(model, dtype)
        cfg = TrainConfig(batch_size=BATCH, compile=False)
        estimates.append(memory.memory_estimate(model, {}, cfg, dtype)["activations"])
        kept.append(kept_by_autograd(model, dtype))
    assert estimates[1] - estimates[0] == pytest.approx(kept[1] - kept[0], rel=0.2)


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("loss_chunks", [0, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_estimate_of_activations_is_what_autograd_keeps(arch, dtype, loss_chunks):
    model = make_gpt(GPTConfig(**SIZES, arch=arch)).train()
    cast_weights(model, dtype)
    model.loss_chunks = loss_chunks
    needed = memory.memory_needed(0, 0, model.config, BATCH, dtype, False, loss_chunks=loss_chunks)
    # of the loss, fp32 log-probabilities, and the tangents that cap the logits, or the gradient by the matrix
    of_loss = (4 if arch == "gpt2" else 8) * 2048 * BATCH * 256 if loss_chunks == 0 else 4 * 2048 * 128
    kept = kept_by_autograd(model, dtype)
    if dtype == "bfloat16":
        kept += weights_in_16_bits(model)
        # a GPU's autocast computes LayerNorm in fp32, and keeps two numbers more than a CPU; a CPU's RMSNorm
        # keeps its input in fp32, 18 of our 2 * 128 bytes here, of which a GPU keeps five
        if arch == "modern":
            kept -= 13 * 2 * 128 * BATCH * 256
    assert needed["activations"] + of_loss == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize(
    "arch, dtype, activation_memory",
    [("gpt2", "bfloat16", x) for x in (1.0, 0.9, 0.8)]
    + [("gpt2", "float32", x) for x in (1.0, 0.8)]
    + [("modern", "bfloat16", x) for x in (1.0, 0.8)],
)
def test_the_estimate_of_activations_is_what_the_compiler_keeps(arch, dtype, activation_memory):
    torch._dynamo.reset()
    model = make_gpt(GPTConfig(**SIZES, arch=arch)).train()
    cast_weights(model, dtype)
    needed = memory.memory_needed(0, 0, model.config, BATCH, dtype, True, activation_memory)
    head = 4 * 2048 * 128  # its gradient, from the forward pass on
    with torch._functorch.config.patch(activation_memory_budget=activation_memory):
        kept = kept_by_the_compiler(model, dtype)
    if dtype == "bfloat16":
        kept += weights_in_16_bits(model)
    if (arch, activation_memory) == ("modern", 0.8):
        # where much is recomputed, that takes room, too
        assert kept < needed["activations"] + head < 1.9 * kept
    else:
        assert needed["activations"] + head == pytest.approx(kept, rel=0.12)


def test_the_memory_of_the_loss_by_hand():
    V, C, tokens = 50304, 768, 16 * 1024

    def needed(compile, loss_chunks, arch="gpt2", dtype="bfloat16"):
        config = GPTConfig(bias=False, arch=arch, n_head=6)
        return memory.loss_bytes(config, tokens, dtype, compile, loss_chunks)

    logits, head = V * tokens, 4 * V * C
    assert needed(True, 0) == 2 * logits / 2 + head  # two chunks suit so many logits
    assert needed(True, 8, dtype="float32") == 4 * logits / 8 + head
    assert needed(False, 8) == 20 * logits / 8 + head
    assert (needed(False, 0), needed(False, 0, "modern")) == (10 * logits, 16 * logits)


def test_the_estimate_grows_with_what_it_is_made_of():
    config = GPTConfig()

    def total(batch_size=8, compile=True, **levers):
        return sum(
            memory.memory_needed(124e6, 992e6, config, batch_size, "bfloat16", compile, **levers).values()
        )

    assert total(16) > total(8) > total(8, loss_chunks=4) > total(8, loss_chunks=8)
    assert total(8, compile=False) > total() > total(activation_memory=0.8)
    # two sets of gradients, when there is nothing else
    assert total(1, loss_chunks=8) > 16 * 124e6 + 4 * 124e6


@pytest.mark.parametrize(
    "n_layer, params, optimizer, peak", [(24, 665.03e6, 3.43e9, 11.78e9), (22, 625.71e6, 3.28e9, 11.07e9)]
)
def test_an_update_of_muon_counts_where_activations_are_few(n_layer, params, optimizer, peak):
    """Against the peaks of CUDA's allocator on a card that gives memory and computes nothing."""
    config = GPTConfig(block_size=256, n_layer=n_layer, n_head=10, n_embd=1280, bias=False, arch="modern")
    needed = memory.memory_needed(params, optimizer, config, 1, "bfloat16", compile=False)
    assert 0.97 * peak < sum(needed.values()) < 1.03 * peak
    # AdamW's moments are twice as large, and its update takes nothing more
    adamw = memory.memory_needed(params, 8 * params, config, 1, "bfloat16", compile=False)
    assert adamw["gradients"] == 4 * params < needed["gradients"]


def test_the_memory_line_adds_up():
    needed = dict(weights=1.5e9, gradients=1.5e9, optimizer=3e9, activations=0.25e9, loss=0.5e9)
    line = memory.memory_line(needed, torch.device("cpu"))
    parts = "weights 1.50, gradients 1.50, optimizer 3.00, activations 0.25, loss 0.50"
    assert re.fullmatch(rf"about 6\.75 GB( of [\d.]+ GB of RAM)?: {parts}", line)
    line = memory.memory_line({name: size / 100 for name, size in needed.items()}, torch.device("cpu"))
    parts = "weights 15.0, gradients 15.0, optimizer 30.0, activations 2.5, loss 5.0"
    assert re.fullmatch(rf"about 67\.5 MB( of [\d.]+ GB of RAM)?: {parts}", line)


def machine(dtype, device="cpu"):
    return hardware.Machine(torch.device(device), dtype, None, "")


def test_the_attention_kernel_is_named_or_not():
    config = GPTConfig(**SIZES)
    name = hardware.attention_backend(machine("bfloat16"), config)
    with torch.profiler.profile(acc_events=True) as profile:
        one_pass(make_gpt(config).train(), "bfloat16")
    kernels = {"FLASH_ATTENTION": "aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert kernels[name] in {event.key for event in profile.key_averages()}
    assert hardware.attention_backend(machine("float32"), GPTConfig(**SIZES, dropout=0.1)) == "MATH"
    assert hardware.attention_backend(machine("float32", "meta"), config) is None


def test_activation_memory_reaches_the_compiler(monkeypatch):
    kept = []
    for share in (1.0, 0.8):
        torch._dynamo.reset()
        model = make_gpt(GPTConfig(**SIZES)).train()
        monkeypatch.setattr(model, "compile", lambda **options: None)
        cpu = hardware.Machine(torch.device("cpu"), "float32", None, "")
        prepare_model(model, TrainConfig(activation_memory=share), cpu)
        kept.append(kept_by_the_compiler(model, "float32"))
    hardware.keep_activations(1.0)
    assert kept[1] < 0.9 * kept[0]


def test_the_estimate_of_a_run_knows_its_levers():
    model = GPT(GPTConfig(**SIZES))

    def total(**keys):
        return sum(memory.memory_estimate(model, {}, TrainConfig(**keys), "float32").values())

    assert total(activation_memory=0.8) < total() and total(loss_chunks=8) < total(loss_chunks=1)
    assert total() < total(compile=False)
