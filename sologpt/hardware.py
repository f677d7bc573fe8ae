"""
What this machine is: its device, the dtype that suits it, and its peak FLOP/s, the denominator of MFU.

Peaks are dense (no 2:4 sparsity), with FP32 accumulation, at the vendor's rated boost clock. A GeForce in a
cool case clocks up to 10 % above its rating, so a good run may read over 80 % there.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch.nn.attention import SDPBackend

from sologpt import parallel
from sologpt.display import warn
from sologpt.errors import UserError, first_line, out_of_memory

# One line a GPU: words of torch.cuda.get_device_name() that identify it, number of SMs (CUs on AMD), then
# TFLOP/s in bf16, fp16, tf32 and fp32; 0 where the hardware has none. AxBxC is SMs x FLOPs per SM and clock x
# GHz, the arithmetic behind a row that no datasheet states; WP is NVIDIA's architecture whitepaper.
# Left out, so that no doubtful number becomes an MFU: cards whose sources disagree (B100, GB300, RTX PRO
# 4500/5000/6000 Server, RTX 4000 Ada, Orin, V100 SXM3 and FHHL) and all laptop GPUs,
# whose clocks depend on the maker's power limit.
PEAKS = [
    # name               SMs   bf16    fp16    tf32   fp32   source
    ("p100 sxm2", 56, 0, 10.6, 0, 10.6),  # P100 datasheet; no tensor cores, so the fp32 rate
    ("p100 pcie", 56, 0, 9.3, 0, 9.3),  # P100 datasheet; no tensor cores, so the fp32 rate
    ("v100 sxm2", 80, 0, 125.0, 0, 15.7),  # V100 datasheet
    ("v100 pcie", 80, 0, 112.0, 0, 14.0),  # V100 datasheet
    ("v100s pcie", 80, 0, 130.0, 0, 16.4),  # V100S datasheet
    ("tesla t4", 40, 0, 65.1, 0, 8.1),  # T4 datasheet
    ("rtx 2060 super", 34, 0, 0, 0, 0),  # another clock: listed so that it is not taken for a 2060
    ("rtx 2060", 30, 0, 25.8, 0, 6.5),  # 30x512x1.680
    ("rtx 2070 super", 40, 0, 36.2, 0, 9.1),  # 40x512x1.770
    ("rtx 2080 super", 48, 0, 44.6, 0, 11.2),  # 48x512x1.815
    ("rtx 2080 ti", 68, 0, 53.8, 0, 13.4),  # Turing WP, reference clock
    ("titan rtx", 72, 0, 130.5, 0, 16.3),  # GA102 WP
    ("quadro rtx 5000", 48, 0, 89.2, 0, 11.2),  # Quadro RTX 5000 datasheet
    ("quadro rtx 6000", 72, 0, 130.5, 0, 16.3),  # Turing WP
    ("quadro rtx 8000", 72, 0, 130.5, 0, 16.3),  # Quadro RTX 8000 datasheet
    ("a100", 108, 312.0, 312.0, 156.0, 19.5),  # A100 WP
    ("a800", 108, 312.0, 312.0, 156.0, 19.5),  # an A100 with less NVLink
    ("a30", 56, 165.2, 165.2, 82.6, 10.3),  # A30 datasheet
    ("a10", 72, 125.0, 125.0, 62.5, 31.2),  # A10 datasheet
    ("a10g", 80, 70.0, 70.0, 35.0, 35.0),  # A10G datasheet
    ("a16", 10, 18.0, 18.0, 9.0, 4.5),  # A16 datasheet, one of its four GPUs
    ("a2", 10, 18.1, 18.1, 9.1, 4.5),  # A2 datasheet
    ("a40", 84, 149.7, 149.7, 74.8, 37.4),  # A40 datasheet
    ("rtx a2000", 26, 31.9, 31.9, 16.0, 8.0),  # RTX A2000 datasheet (63.9 sparse)
    ("rtx a4000", 48, 76.7, 76.7, 38.3, 19.2),  # RTX A4000 datasheet (153.4 sparse)
    ("rtx a4500", 56, 94.6, 94.6, 47.3, 23.7),  # RTX A4500 datasheet (189.2 sparse)
    ("rtx a5000", 64, 111.1, 111.1, 55.5, 27.8),  # RTX A5000 datasheet (222.2 sparse)
    ("rtx a5500", 80, 136.4, 136.4, 68.2, 34.1),  # RTX A5500 datasheet (272.8 sparse)
    ("rtx a6000", 84, 154.8, 154.8, 77.4, 38.7),  # GA102 WP
    ("rtx 3050", 20, 18.2, 18.2, 9.1, 9.1),  # the 8 GB card: 20x512x1.777
    ("rtx 3050", 18, 13.5, 13.5, 6.8, 6.8),  # the 6 GB card: 18x512x1.470
    ("rtx 3060", 28, 25.5, 25.5, 12.7, 12.7),  # 28x512x1.777
    ("rtx 3060 ti", 38, 32.4, 32.4, 16.2, 16.2),  # 38x512x1.665
    ("rtx 3070", 46, 40.6, 40.6, 20.3, 20.3),  # GA102 WP
    ("rtx 3070 ti", 48, 43.5, 43.5, 21.7, 21.7),  # RTX Blackwell WP
    ("rtx 3080", 68, 59.5, 59.5, 29.8, 29.8),  # GA102 WP; the 10 GB card
    ("rtx 3080", 70, 61.3, 61.3, 30.6, 30.6),  # the 12 GB card: 70x512x1.710
    ("rtx 3080 ti", 80, 68.2, 68.2, 34.1, 34.1),  # 80x512x1.665
    ("rtx 3090", 82, 71.2, 71.2, 35.6, 35.6),  # GA102 WP
    ("rtx 3090 ti", 84, 80.0, 80.0, 40.0, 40.0),  # GA102 WP
    ("l4", 58, 121.2, 121.2, 60.6, 30.3),  # L4 datasheet (242 sparse)
    ("l20", 92, 119.5, 119.5, 59.8, 59.8),  # 92x512x2.520; 105 to 115 measured in cuBLAS by CUDA-Learn-Notes
    ("l40", 142, 181.0, 181.0, 90.5, 90.5),  # L40 datasheet
    ("l40s", 142, 366.4, 366.4, 183.2, 91.6),  # 142x1024x2.520; the datasheet prints 362.05 dense, 733 sparse
    ("rtx 2000 ada", 22, 48.0, 48.0, 24.0, 12.0),  # RTX 2000 Ada datasheet (191.9 FP8 sparse)
    ("rtx 4000 sff ada", 48, 76.7, 76.7, 38.3, 19.2),  # RTX 4000 SFF Ada datasheet (306.8 FP8 sparse)
    ("rtx 4500 ada", 60, 158.5, 158.5, 79.3, 39.6),  # RTX 4500 Ada datasheet (634.0 FP8 sparse)
    ("rtx 5000 ada", 100, 261.1, 261.1, 130.6, 65.3),  # RTX 5000 Ada datasheet (1044.4 FP8 sparse)
    ("rtx 5880 ada", 110, 277.1, 277.1, 138.5, 69.3),  # RTX 5880 Ada datasheet (1108.4 FP8 sparse)
    ("rtx 6000 ada", 142, 364.2, 364.2, 182.1, 91.1),  # RTX 6000 Ada datasheet (1457.0 FP8 sparse)
    ("rtx 4060", 24, 30.2, 30.2, 15.1, 15.1),  # 24x512x2.460
    ("rtx 4060 ti", 34, 44.1, 44.1, 22.1, 22.1),  # 34x512x2.535
    ("rtx 4070", 46, 58.3, 58.3, 29.1, 29.1),  # 46x512x2.475
    ("rtx 4070 super", 56, 71.0, 71.0, 35.5, 35.5),  # 56x512x2.475
    ("rtx 4070 ti", 60, 80.2, 80.2, 40.1, 40.1),  # 60x512x2.610
    ("rtx 4070 ti super", 66, 88.2, 88.2, 44.1, 44.1),  # 66x512x2.610
    ("rtx 4080", 76, 97.5, 97.5, 48.7, 48.7),  # Ada WP
    ("rtx 4080 super", 80, 104.4, 104.4, 52.2, 52.2),  # 80x512x2.550
    ("rtx 4090", 128, 165.2, 165.2, 82.6, 82.6),  # Ada WP, appendix A
    ("rtx 4090 d", 114, 147.1, 147.1, 73.5, 73.5),  # 114x512x2.520
    ("h100 hbm3", 132, 989.4, 989.4, 494.7, 66.9),  # H100 datasheet, SXM (1979 sparse)
    ("h100 hbm2e", 114, 756.4, 756.4, 378.2, 51.2),  # H100 datasheet, PCIe under its early name
    ("h100 pcie", 114, 756.4, 756.4, 378.2, 51.2),  # H100 datasheet (1513 sparse)
    ("h100 nvl", 132, 835.5, 835.5, 417.7, 60.3),  # H100 datasheet (1671 sparse)
    ("h800", 132, 989.4, 989.4, 494.7, 66.9),  # an H100 SXM with less NVLink
    ("h800 nvl", 132, 0, 0, 0, 0),  # its figures are not published: not to be taken for the SXM one
    ("h800 pcie", 114, 756.4, 756.4, 378.2, 51.2),  # an H100 PCIe with less NVLink
    ("h20", 78, 148.0, 148.0, 74.0, 44.0),  # 148 in torchtitan and verl; NVIDIA publishes no page
    ("h200", 132, 989.4, 989.4, 494.7, 66.9),  # H200 datasheet, SXM (1979 sparse)
    ("h200 nvl", 132, 835.5, 835.5, 417.7, 60.3),  # H200 datasheet (1671 sparse)
    ("gh200", 132, 989.4, 989.4, 494.7, 66.9),  # GH200 datasheet
    ("b200", 148, 2250.0, 2250.0, 1100.0, 75.0),  # Blackwell datasheet (4.5 PF sparse)
    ("gb200", 152, 2500.0, 2500.0, 1250.0, 80.0),  # Blackwell datasheet (5 PF sparse)
    ("b300", 148, 2250.0, 2250.0, 1125.0, 75.0),  # HGX B300 page (4.5 PF sparse)
    ("rtx pro 4000 blackwell", 70, 147.3, 147.3, 73.7, 36.8),  # 1178 FP4 sparse AI TOPS / 8
    ("rtx pro 4000 blackwell sff", 70, 0, 0, 0, 0),  # half the clock: not to be taken for the full card
    ("rtx pro 6000 blackwell workstation", 188, 503.8, 503.8, 251.9, 126.0),  # RTX Blackwell PRO WP
    ("rtx pro 6000 blackwell max q workstation", 188, 438.9, 438.9, 219.5, 109.7),  # RTX Blackwell PRO WP
    ("rtx 5050", 20, 26.3, 26.3, 13.2, 13.2),  # 20x512x2.572
    ("rtx 5060", 30, 38.4, 38.4, 19.2, 19.2),  # 30x512x2.497
    ("rtx 5060 ti", 36, 47.4, 47.4, 23.7, 23.7),  # 36x512x2.572
    ("rtx 5070", 48, 61.7, 61.7, 30.9, 30.9),  # RTX Blackwell WP
    ("rtx 5070 ti", 70, 87.9, 87.9, 43.9, 43.9),  # RTX Blackwell WP
    ("rtx 5080", 84, 112.6, 112.6, 56.3, 56.3),  # RTX Blackwell WP
    ("rtx 5090", 170, 209.5, 209.5, 104.8, 104.8),  # RTX Blackwell WP
    ("rtx 5090 d", 170, 0, 0, 0, 0),  # no printed bf16 figure: listed so that it is not taken for a 5090
    ("gb10", 48, 124.1, 124.1, 62.1, 31.0),  # DGX Spark: 31 TF fp32 (Hot Chips 2025) x 4
    ("thor", 20, 258.0, 258.0, 129.0, 8.1),  # Jetson T5000: 2070 FP4 sparse / 8
    ("mi210", 104, 181.0, 181.0, 0, 45.3),  # MI210 datasheet, fp32 matrix
    ("mi250", 104, 181.0, 181.0, 0, 45.3),  # MI250 datasheet, one of its two dies, as torch sees it
    ("mi250x", 110, 191.5, 191.5, 0, 47.9),  # MI250X datasheet, one of its two dies, as torch sees it
    ("mi300a", 228, 980.6, 980.6, 490.3, 122.6),  # MI300A datasheet
    ("mi300x", 304, 1307.4, 1307.4, 653.7, 163.4),  # MI300X datasheet
    ("mi325x", 304, 1307.4, 1307.4, 653.7, 163.4),  # MI325X datasheet
    ("mi350x", 256, 2306.9, 2306.9, 0, 144.2),  # MI350X datasheet
    ("mi355x", 256, 2516.6, 2516.6, 0, 157.3),  # MI355X datasheet
]
DTYPES = ("bfloat16", "float16", "float32")
ESTIMATES = {"h20", "gb10", "thor"}  # rows that rest on press reports or on a rate that NVIDIA does not state


def peak_flops(name, sm_count, dtype):
    """Returns (dense peak in FLOP/s or None if unknown, a phrase that says what it is) of one GPU.

    name: torch.cuda.get_device_name(), matched by whole words, the row with most words first: an RTX A4000 is
    no A40, an RTX 4070 Ti no RTX 4070. sm_count: its multi_processor_count; a MIG slice, a vGPU or a
    cut-down variant has fewer SMs than its row and gets that share of the peak. dtype: 'bfloat16', 'float16'
    or 'float32' (tf32 where the GPU has it, which torch.set_float32_matmul_precision("high") turns on).
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & {"laptop", "design", "embedded"}:  # "... Laptop GPU", "... with Max-Q Design"
        return None, f"no peak is known for {name}: the clock of such a GPU depends on its power limit"
    rows = [row for row in PEAKS if set(row[0].split()) <= words]
    if not rows:
        return None, f"no peak is known for {name}"
    row, sms, bf16, fp16, tf32, fp32 = max(rows, key=lambda row: (len(row[0].split()), row[1] == sm_count))
    kinds = dict(bfloat16=("bf16", bf16), float16=("fp16", fp16), float32=("fp32", fp32))
    if tf32:
        kinds["float32"] = ("tf32", tf32)
    kind, tflops = kinds[dtype]
    if not tflops or sm_count > sms:  # more SMs: a variant that the row is not about
        return None, f"no {kind} peak is known for {name} with {sm_count} SMs"
    share = "" if sm_count == sms else f", {sm_count} of {sms} SMs"
    guess = ", an estimate" if row in ESTIMATES else ""
    peak = tflops * sm_count / sms
    return peak * 1e12, f"{peak:.1f} TFLOP/s dense {kind} peak of {name}{share}{guess}"


# -----------------------------------------------------------------------------
# the device


@dataclass(frozen=True)
class Machine:
    """What a script computes on."""

    device: torch.device
    dtype: str  # of matmuls: "bfloat16", "float16" or "float32"
    peak: float | None  # FLOP/s that MFU is measured against; None: unknown
    line: str  # what to tell the user: device and dtype, the peak, and why they were chosen

    def autocast(self):
        """Returns a context in which matmuls run in this machine's dtype."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))

    def synchronize(self):
        """Waits until the device has done all its work, so that a clock read next is right."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def find_machine(cfg):
    """Returns the Machine for the keys device, dtype, peak_flops and compile, and sets torch up for it. Where
    Windows lacks what compiling needs, it warns and sets cfg.compile=False.

    Raises UserError for a device, dtype or compiler that is not available.
    """
    use_expandable_segments()
    device, device_reason = pick_device(cfg.device)
    if parallel.processes() > 1 and device.type == "cuda":
        device = own_gpu(device)
    check_gpu(device)
    dtype, dtype_reason = pick_dtype(cfg.dtype, device)
    peak, peak_reason = device_peak(device, dtype)
    if cfg.peak_flops:
        peak, peak_reason = cfg.peak_flops, f"{cfg.peak_flops / 1e12:g} TFLOP/s as given by peak_flops"
    if cfg.compile and sys.platform == "win32" and (obstacle := windows_obstacle(device)):
        warn(f"{obstacle}; going on without torch.compile, more slowly; --loss_chunks=8 saves memory then")
        cfg.compile = False
        if problems := cfg.problems():  # keys that need it
            raise UserError(f"{obstacle}; until then: {'; '.join(problems)}")
    if cfg.compile:
        check_compiler(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for what is left in fp32, as in nanoGPT
        if has_windows_driver():
            keep_to_gpu_memory(device)
    mfu = f"mfu n/a, {peak_reason}"
    if peak:
        mfu = f"mfu of {peak_reason}"
    line = f"device: {device_name(device)} ({device_reason}), {dtype} ({dtype_reason}); {mfu}"
    return Machine(device, dtype, peak, line)


def connect_processes(cfg, machine):
    """Connects the processes of a run of train.py. Returns the Machine of all: its peak is the sum of theirs,
    None if one is unknown. Raises UserError if they cannot share the run."""
    count, steps = parallel.processes(), cfg.gradient_accumulation_steps
    if count == 1:
        return machine
    if steps % count:
        flags = f"--gradient_accumulation_steps={steps + count - steps % count}"
        if cfg.sequences_per_iter % count == 0:  # the same iteration in smaller micro-batches
            share = cfg.sequences_per_iter // count
            batch_size = max(b for b in range(1, cfg.batch_size + 1) if share % b == 0)
            if 2 * batch_size >= cfg.batch_size:
                more = count * share // batch_size
                flags = f"--batch_size={batch_size} --gradient_accumulation_steps={more}"
        raise UserError(
            f"gradient_accumulation_steps={steps} counts the micro-batches of all {count} processes, so it "
            f"must be a multiple of {count}: {flags}"
        )
    backend = "gloo"
    if machine.device.type == "cuda":
        backend = f"cpu:gloo,cuda:{cfg.backend}"  # what the processes agree on does not wait for the GPU
    elif machine.device.type != "cpu" or ("backend" in cfg.given and cfg.backend != "gloo"):
        raise UserError(f"several processes on {machine.device.type} need --device=cpu and --backend=gloo")
    if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE={count} is set: start that many processes with torchrun")
    # its functions keep the group of the time of their import as a default: it would never be freed, and its
    # threads can then abort a process that ends
    importlib.import_module("torch.distributed.nn.functional")
    try:
        torch.distributed.init_process_group(backend, timeout=parallel.TIMEOUT)
    except RuntimeError as e:
        raise UserError(f"the {count} processes cannot reach each other: {e}") from None
    # takes the memory for it now; NCCL has other buffers for large tensors than for small ones
    parallel.combine([torch.zeros(2**24, device=machine.device)], parallel.SUM)
    peak = parallel.all_reduce([machine.peak or -math.inf], parallel.SUM)[0]
    if peak < 0:
        peak = None  # that of one is unknown
    return dataclasses.replace(machine, peak=peak, line=f"{machine.line}; {count} processes")


def use_expandable_segments():
    """Makes torch keep CUDA memory in segments that grow, instead of fixed ones with gaps too small to use,
    unless the user has set the variable. It is read at the first use of CUDA. Windows does not have it, and
    under WSL it can fail (https://github.com/pytorch/pytorch/issues/192330)."""
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    if sys.platform == "linux" and not has_windows_driver() and not names & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def has_windows_driver():
    """Whether the GPU's driver is that of Windows, as it is under WSL too."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def keep_to_gpu_memory(device):
    """Makes torch raise OutOfMemoryError where the driver of Windows would give more than the GPU has: that
    is the computer's memory, and many times slower, so that a micro-batch that does not fit would go
    unnoticed (https://github.com/microsoft/WSL/issues/11050). Of what is free, 0.3 GB are left for CUDA's
    libraries."""
    usable = max(0.0, available_memory(device) - 0.3e9)
    number = torch.cuda.current_device()
    if device.index is not None:
        number = device.index
    torch.cuda.set_per_process_memory_fraction(usable / total_memory(device), number)


def pick_device(asked):
    """Returns (torch.device, reason). asked: '' for the best available, or 'cuda', 'cuda:1', 'mps', 'cpu'.

    Raises UserError if that device is not available: a run on the wrong device is worse than none.
    """
    if not asked:
        if torch.cuda.is_available():
            return torch.device("cuda"), "the default, as torch sees a GPU"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "the default, as torch sees an Apple GPU"
        return torch.device("cpu"), "torch sees no GPU"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"device={asked!r} is not a device; use cuda, cuda:N, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"device={asked!r} is not supported; use cuda, cuda:N, mps or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = "" if torch.version.cuda or torch.version.hip else " (this torch is a CPU build)"
        seen = f"torch sees {torch.cuda.device_count()} GPUs{built}"
        raise UserError(f"device={asked!r}, but {seen}; leave --device out for the best device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but torch sees no Apple GPU; leave --device out for the best device")
    return device, "as asked"


def own_gpu(device):
    """Returns the GPU of this process of several. Raises UserError if there are not as many as processes."""
    number, count = parallel.from_torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
    if device.index is not None or number >= count:
        raise UserError(
            f"each process takes a GPU of its own, and torch sees {count}: leave --device out, and start "
            f"--nproc_per_node={count} processes or fewer"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def check_gpu(device):
    """Raises UserError if torch has no kernels for a GPU, as its usual builds do not for old ones."""
    if device.type != "cuda":
        return
    try:
        torch.ones(1, device=device)
    except RuntimeError as e:
        raise UserError(
            f"torch {torch.__version__} cannot use {device_name(device)}: {first_line(e)}; if the GPU is too "
            f"old or too new for it, https://pytorch.org/get-started has other builds"
        ) from None


def pick_dtype(asked, device):
    """Returns ('bfloat16', 'float16' or 'float32', reason) for matmuls on device; asked: '' for its default.

    Raises UserError for float16 off CUDA, where there is no gradient scaler against underflow, and for
    bfloat16 on a GPU that would only emulate it.
    """
    if asked == "float16" and device.type != "cuda":
        raise UserError(f"dtype='float16' needs a CUDA GPU, this is {device.type}; use bfloat16 or float32")
    if asked == "bfloat16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(
            f"dtype='bfloat16', but {device_name(device)} has no bf16; use float16, or leave --dtype out"
        )
    if asked == "bfloat16" and device.type == "cpu" and not has_bf16(device):
        return asked, "as asked; torch has no fast bf16 on this CPU: float32 is many times faster"
    if asked:
        return asked, "as asked"
    if device.type != "cuda":
        return "float32", f"the default on {device.type}"
    if has_bf16(device):
        return "bfloat16", "this GPU has bf16"
    return "float16", "this GPU has no bf16; fp16 with loss scaling"


def has_bf16(device):
    """Returns whether a GPU has units for bf16, or a CPU multiplies bf16 matrices about as fast as fp32 ones;
    False where that is not known. On an AMD EPYC without AVX-512, Zen 3, they take 47 times as long (1,024 *
    1,024, one thread)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_peak(device, dtype):
    """Returns peak_flops of this machine's device: (FLOP/s or None, a phrase that says what it is)."""
    if device.type != "cuda":
        return None, f"no peak is known for {device.type}"
    properties = torch.cuda.get_device_properties(device)
    return peak_flops(torch.cuda.get_device_name(device), properties.multi_processor_count, dtype)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def attention_backend(machine, config):
    """Returns the name of the kernel that F.scaled_dot_product_attention takes in training, for example
    FLASH_ATTENTION; None where torch does not tell. It depends on dtype, T, D = n_embd / n_head, dropout."""
    device = machine.device
    # no public function tells
    if device.type not in ("cuda", "cpu") or not hasattr(torch, "_fused_sdp_choice"):
        return None
    shape = (1, config.block_size, 3, config.n_head, config.n_embd // config.n_head)
    qkv = torch.empty(shape, device=device, dtype=getattr(torch, machine.dtype), requires_grad=True)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # with the strides they have in GPT-2
    choice = torch._fused_sdp_choice(q, k, v, None, config.dropout, is_causal=True)
    names = {int(backend): name for name, backend in SDPBackend.__members__.items() if name != "ERROR"}
    return names.get(choice)


def avoid_cudnn_attention():
    """Turns off cuDNN's attention, for sampling with a cache: for one query at a time it is wrong on a B200
    (https://github.com/pytorch/pytorch/issues/193893)."""
    torch.backends.cuda.enable_cudnn_sdp(False)


# -----------------------------------------------------------------------------
# memory


def available_memory(device):
    """Returns the bytes of device memory that this process holds or could still get; None off CUDA."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def total_memory(device):
    """Returns the bytes of memory that a device has in all, of a computer those that this process may use;
    None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min([has, *group_limits()])
    return None


def group_limits(root=""):
    """Returns the limits, in bytes, that control groups set for the memory of this process: those of
    containers and of SLURM (https://docs.kernel.org/admin-guide/cgroup-v2.html). root: of the file system."""
    try:
        with open(f"{root}/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as f:
            lines = f.read().splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")  # its number comes first
        controllers, _, path = rest.partition(":")
        if not controllers:
            file = f"{root}/sys/fs/cgroup{{}}/memory.max"
        elif "memory" in controllers.split(","):  # version 1
            file = f"{root}/sys/fs/cgroup/memory{{}}/memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for part in (group, *group.parents):  # those above count too; in a container it may be the root
            with contextlib.suppress(OSError, ValueError):  # no such file; "max" is no limit
                with open(file.format(part), encoding="utf-8") as f:
                    limits.append(int(f.read()))
    return limits


def peak_memory(device):
    """Returns the most bytes that tensors of this process have taken at one time; None off CUDA. No sync."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# -----------------------------------------------------------------------------
# torch.compile


def check_compiler(device):
    """Raises UserError, with what to install, if torch.compile cannot work here: torch itself would find out
    in the middle of the first step, with a page of traceback."""
    if obstacle := compile_obstacle(device):
        raise UserError(f"{obstacle}; or run without it: --compile=False")


def compile_obstacle(device, include=None):
    """Returns why torch.compile cannot work here and what to install, or None. include: the folder of
    Python.h. On Windows windows_obstacle says so."""
    if sys.platform == "win32" or device.type == "mps":
        return None
    if device.type == "cuda":
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        package = "gcc"
    else:
        default = "clang++" if sys.platform == "darwin" else "g++"
        compilers = [os.environ.get("CXX") or default]
        package = "g++"
    if not any(shutil.which(compiler) for compiler in compilers):
        names = " or ".join(compilers)
        return f"torch.compile needs a compiler, and {names} is not on the PATH (apt install {package})"
    include = include or sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        text = f"torch.compile needs Python's header files, and {include} has no Python.h"
        return f"{text} (apt install {package})"
    return None


def windows_obstacle(device):
    """Returns why torch.compile cannot work on Windows, where torch brings no Triton, and what to install; or
    None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton: pip install triton-windows"
    if device.type == "cpu" and not shutil.which("cl"):
        return "torch.compile needs a C++ compiler, cl of Visual Studio's Build Tools, on the PATH"
    return None


def keep_activations(share):
    """Sets torch's budget of activations for models compiled from now on."""
    from torch._functorch import config  # takes a second: only where something is compiled

    config.activation_memory_budget = share


@contextlib.contextmanager
def compiling():
    """Returns a context for the first pass through a compiled model: what torch raises there, often with a
    page of traceback, becomes a UserError of one line; a ValueError, and memory that runs out, pass as
    they are."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError) or out_of_memory(e):
            raise
        raise UserError(f"torch.compile failed: {first_line(e)}; try --compile=False") from e


def forget_compiled(device):
    """Gives unused memory back to the device, whose peak_memory begins anew, and makes torch.compile start
    anew: after several batch sizes it would give up compiling (torch._dynamo.config.recompile_limit) and run
    uncompiled."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
