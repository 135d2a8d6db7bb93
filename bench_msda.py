"""Deformable attention, every way this machine can compute it: is it right, and how fast beside its peers, in one run.

    python bench.py msda

On a CPU: beside the definition (`F.grid_sample`). On a GPU: first whether the kernel is right, then its speed beside the
definition, and beside the published kernels where the path to a checkout of theirs is given, which needs nvcc:

    python bench.py msda --deformable-detr Deformable-DETR --dcnv4 DCNv4
"""
import argparse
import contextlib
import functools
import gc
import importlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import msda
from msda_cuda import cpu, cuda, plain

# (h, w) of the four levels of an 800 x 1066 and an 800 x 1333 photo, and of a 128 x 128 toy picture.
PHOTO = [(100, 134), (50, 67), (25, 34), (13, 17)]
LARGE = [(100, 167), (50, 84), (25, 42), (13, 21)]
TOY = [(16, 16), (8, 8), (4, 4), (2, 2)]


def inputs(shapes, B, Q, M, D, P=4, R=2, dtype=torch.float32, device="cpu", seed=0):
    """Arguments of msda.msda: offsets of some cells around the reference, as attention looks; a part falls outside.

    Without Q the queries are the tokens, each at its own place in reading order, as in an encoder.
    """
    g = torch.Generator(device).manual_seed(seed)
    L, S = len(shapes), sum(h * w for h, w in shapes)

    def normal(*size):
        return torch.randn(*size, generator=g, device=device)
    if Q is None:
        Q = S
        centre = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
                            for h, w in shapes]).to(device).expand(B, -1, -1)
    else:
        centre = torch.rand(B, Q, 2, generator=g, device=device)
    reference = torch.cat([centre, torch.full_like(centre, 0.2)], -1)[:, :, None, :R].repeat(1, 1, L, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return (normal(B, S, M, D).to(dtype), shapes, (3 * normal(B, Q, M, L, P, 2)).to(dtype), normal(B, Q, M, L, P).to(dtype),
            reference.to(wide))


def definition(value, shapes, offsets, logits, reference):
    """The op in plain PyTorch by F.grid_sample, in the dtype of the value, as autograd differentiates it."""
    locations, weights = msda.sampling(shapes, offsets, logits, reference.to(offsets.dtype))
    return msda.msda_grid_sample(value, shapes, locations, weights)


class Native(torch.autograd.Function):
    """A module of msda_cuda with forward and backward, as an autograd function."""

    @staticmethod
    def forward(ctx, module, value, shapes, offsets, logits, reference):
        ctx.save_for_backward(value, offsets, logits, reference)
        ctx.module, ctx.shapes = module, shapes
        return module.forward(value, shapes, offsets, logits, reference)

    @staticmethod
    def backward(ctx, grad):
        value, offsets, logits, reference = ctx.saved_tensors
        grads = ctx.module.backward(grad.contiguous(), value, ctx.shapes, offsets, logits, reference,
                                    ctx.needs_input_grad[5])
        return None, grads[0], None, *grads[1:]


def with_gradients(args):
    """The arguments with value, offsets and logits as leaves that want gradients."""
    return tuple(a.detach().clone().requires_grad_() if i in (0, 2, 3) else a for i, a in enumerate(args))


# ================================================================================================================ CPU

def alternate(ways, runs):
    """Seconds of every way, {name: [runs]}: after one warm-up each, in turn, so that drift hits all of them alike."""
    seconds = {name: [] for name in ways}
    for round_ in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_growth(work):
    """MB that the process's peak memory grew by while work() ran, in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        import resource
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return int(answer.read() or 0) / 1024


def bench_cpu(runs):
    """Forward, and forward with backward, at encoder and decoder shapes."""
    ways = {"grid_sample": definition, "plain.py": functools.partial(Native.apply, plain)}
    with contextlib.suppress(OSError):
        cpu.library()
        ways["cpu.cpp"] = functools.partial(Native.apply, cpu)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, median of {runs}")
    if torch.get_num_threads() > 1:
        print("memory is measured with OMP_NUM_THREADS=1")                        # a fork loses the other threads
    else:                                                           # before all else, which would leave memory to reuse
        args = with_gradients(inputs(PHOTO, 1, None, 8, 32))
        for name, op in ways.items():
            grown = peak_growth(lambda op=op: op(*args).sum().backward())
            print(f"encoder, 800 x 1066 photo, batch 1   peak memory, both    {name:12} {grown:8.0f} MB")
    for title, shapes, B, Q, M, D in [
            ("encoder, 800 x 1066 photo, batch 1", PHOTO, 1, None, 8, 32),
            ("decoder, 300 queries, batch 1", PHOTO, 1, 300, 8, 32), ("encoder, toy, batch 16", TOY, 16, None, 8, 16)]:
        args = with_gradients(inputs(shapes, B, Q, M, D))

        def forward(op):
            with torch.no_grad():
                op(*args)

        def both(op):
            op(*args).sum().backward()

        for what, work in (("forward", forward), ("forward + backward", both)):
            seconds = alternate({name: functools.partial(work, op) for name, op in ways.items()}, runs)
            for name, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(seconds["grid_sample"], taken))
                print(f"{title:36} {what:20} {name:12} {1e3 * statistics.median(taken):8.1f} ms   {ratio:5.2f} x")


# ================================================================================================== GPU: is it right

def apart(a, b):
    """Relative error of a against b, as norms; NaN never passes."""
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def compare(title, limit, args, op=msda.msda):
    """Output and gradients of the operator against autograd through the definition in float64.

    A point within 1e-3 of a pixel's centre has one slope on either side, and float32 may take it for being on the other:
    there the gradients of offset and reference are not compared.
    """
    wanted = [a.detach().double().requires_grad_() if torch.is_tensor(a) else a for a in args]
    want = msda.msda_grid_sample(wanted[0], args[1], *msda.sampling(*wanted[1:]))
    grad = torch.randn_like(want).to(args[0].dtype)
    want.backward(grad.double())
    mine = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
    out = op(*mine)
    out.backward(grad)
    with torch.no_grad():
        size = torch.tensor([(w, h) for h, w in args[1]], device=want.device)[:, None]
        pixel = msda.sampling(*wanted[1:])[0] * size - 0.5
        centred = (pixel - pixel.round()).abs() < 1e-3
        either = centred.any(4).any(2).repeat(1, 1, 1, args[4].shape[-1] // 2)
        for some in (mine, wanted):
            some[2].grad[centred], some[4].grad[either] = 0, 0
    errors = [apart(out, want.detach()), *(apart(a.grad, b.grad) for a, b in zip(mine, wanted) if torch.is_tensor(a))]
    worst = max(errors, key=lambda x: x if x == x else float("inf"))
    verdict(title, worst < limit, f"error {worst:.1e}, allowed {limit:.0e}")


def verdict(title, right, detail=""):
    verdict.failed += not right
    print(f"{'right' if right else 'WRONG'}   {title:64} {detail}", flush=True)


verdict.failed = 0


def check_gpu():
    """Whatever can go wrong on a GPU and not in the tests; one line each."""
    limits = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
    tiny = [(9, 7), (5, 4), (3, 2), (1, 1)]
    started = time.perf_counter()
    msda.msda(*inputs(tiny, 1, 5, 8, 32, device="cuda"))
    torch.cuda.synchronize()
    print(f"first use, compilation or cache included: {time.perf_counter() - started:.2f} s")
    # Memory comes filled with NaN, so that what a kernel leaves unwritten shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype, limit in limits.items():
        for shapes, B, Q, M, D, P, R in [
                (tiny, 2, 37, 8, 32, 4, 2), (tiny, 2, 37, 8, 32, 4, 4), (tiny, 3, 11, 5, 7, 3, 4),
                ([(1, 1)], 1, 1, 1, 1, 1, 2),
                ([(3, 5), (2, 2)], 1, 70, 1, 4, 40, 4), ([(3, 5)], 2, 5, 2, 264, 3, 2), (TOY, 4, None, 8, 16, 4, 2),
                ([(3, 5)], 2, 0, 2, 8, 3, 2), (PHOTO, 1, 900, 8, 32, 4, 4), (PHOTO, 1, None, 8, 32, 4, 2)]:
            compare(f"{str(dtype)[6:]}, {len(shapes)} levels, B={B} Q={Q} M={M} D={D} P={P} R={R}", limit,
                    inputs(shapes, B, Q, M, D, P, R, dtype, "cuda"))
    torch.use_deterministic_algorithms(False)
    half = list(inputs(tiny, 2, 37, 8, 32, dtype=torch.bfloat16, device="cuda"))
    half[2], half[3] = half[2].float(), half[3].float()
    compare("bfloat16 value, float32 offsets and logits", 1.5e-2, half)
    args = list(inputs(tiny, 2, 37, 8, 32, device="cuda"))
    compare("plain.py on the GPU", 1e-5, args, functools.partial(Native.apply, plain))
    views = [a.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(a) else a for a in args]
    compare("inputs that are not contiguous", 1e-5, views)
    views = [torch.nn.functional.pad(a.flatten(), (1, 0))[1:].view(a.shape) if torch.is_tensor(a) else a for a in args]
    compare("inputs that are not aligned", 1e-5, views)
    outside = [a.clone() if torch.is_tensor(a) else a for a in args]
    outside[2][0, 0], outside[2][0, 1], outside[2][0, 2] = torch.nan, torch.inf, -1e30
    verdict("NaN, infinity and far points read nothing", not msda.msda(*outside)[0, :3].any())
    again = [msda.msda(*inputs(PHOTO, 1, None, 8, 32, device="cuda")) for _ in range(3)]
    verdict("forward gives the same bits every time", all(torch.equal(again[0], a) for a in again))
    verdict("wrong arguments are refused", refuses(args))

    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    several = [inputs(PHOTO, 1, None, 8, 32, device="cuda", seed=i) for i in range(4)]
    torch.cuda.synchronize()
    for stream, some in zip(streams, several):
        with torch.cuda.stream(stream):
            results.append(msda.msda(*some))
    torch.cuda.synchronize()
    verdict("four streams at once", all(torch.equal(r, msda.msda(*some)) for r, some in zip(results, several)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = msda.msda(*several[0])
    several[0][0].copy_(several[1][0])
    graph.replay()
    verdict("captured in a CUDA graph and replayed", torch.equal(captured, msda.msda(*several[0])))
    for i in range(1, torch.cuda.device_count()):
        elsewhere = [a.to(f"cuda:{i}") if torch.is_tensor(a) else a for a in args]
        verdict(f"on cuda:{i}, not the current device", torch.equal(msda.msda(*elsewhere).cpu(), msda.msda(*args).cpu()))

    layer = msda.MSDeformAttn(256, 4, 8, 4).cuda()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.02)
    query = torch.randn(2, 300, 256, device="cuda")
    call = query, args[4][:, :1].expand(2, 300, 4, 2), inputs(tiny, 2, 300, 8, 32, device="cuda")[0], tiny
    want = layer(*call)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = layer(call[0], call[1], call[2].bfloat16(), tiny)
    verdict("autocast to bfloat16", apart(mixed, want.double()) < 0.03, f"error {apart(mixed, want.double()):.1e}")
    try:
        compiled = torch.compile(layer, fullgraph=True)(*call)
        gradients = [torch.autograd.grad(out.square().sum(), list(layer.parameters())[:4]) for out in (compiled, want)]
        worst = max(apart(a, b.double()) for a, b in zip(*gradients))
        verdict("torch.compile, forward and backward", worst < 1e-4, f"error {worst:.1e}")
    except Exception as error:                       # torch's compiler needs Triton and a C compiler; either may be absent
        print(f"torch.compile: not run ({type(error).__name__}: {str(error)[:200]})")
    del several, results, again, captured, graph
    if torch.cuda.mem_get_info()[0] > 60e9:
        S = sum(h * w for h, w in LARGE)
        B = 2 ** 31 // (S * 256) + 2
        big = with_gradients(inputs(LARGE, B, 3, 8, 32, dtype=torch.float16, device="cuda"))
        last = with_gradients([a[-1:] if torch.is_tensor(a) else a for a in big])
        outs = [msda.msda(*big), msda.msda(*last)]
        for out in outs:
            out.sum().backward()
        verdict(f"a value of {big[0].numel():.2e} numbers, beyond 32 bits", torch.equal(outs[0][-1:], outs[1]) and
                apart(big[0].grad[-1:], last[0].grad.double()) < 1e-3)
    torch.cuda.empty_cache()


def refuses(args):
    value, shapes, offsets, logits, reference = args
    wrong = [(value[:, 1:], shapes, offsets, logits, reference), (value, shapes, offsets.cpu(), logits, reference),
             (value, shapes, offsets, logits[:, 1:], reference), (value.int(), shapes, offsets, logits, reference)]
    refused = 0
    for some in wrong:
        try:
            msda.msda(*some)
        except ValueError:
            refused += 1
    return refused == len(wrong)


def sanitize():
    """The correctness run once more under compute-sanitizer, if there is one and it works here."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not tool:
        return print("compute-sanitizer is not installed: not run")
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--sanitized"]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer --tool {kind}: not finished in 300 s")
            continue
        last = (ran.stdout + ran.stderr).strip().splitlines()[-1:]
        verdict(f"compute-sanitizer --tool {kind}", ran.returncode == 0, " ".join(last)[:120])


def check_sanitized():
    """What runs under compute-sanitizer: both kernels, all dtypes, few queries."""
    for dtype in cuda.TYPES:
        for D, R in ((32, 2), (7, 4)):
            args = with_gradients(inputs([(9, 7), (3, 2)], 2, 13, 3, D, 4, R, dtype, "cuda"))
            msda.msda(*args).sum().backward()
    torch.cuda.synchronize()


# ================================================================================================== GPU: is it fast

def published(path, package, name, patch):
    """A published extension's module, built from a checkout's copy; `patch` mends what its torch version had renamed."""
    copy = Path(tempfile.mkdtemp(prefix="peer-")) / "ops"
    shutil.copytree(path, copy)
    for file in [*copy.rglob("*.cu"), *copy.rglob("*.cuh"), *copy.rglob("*.h"), *copy.rglob("*.cpp")]:
        text = file.read_text(errors="replace")
        for old, new in patch:
            text = text.replace(old, new)
        file.write_text(text)
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": "8"}
    built = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=copy, env=environment,
                           capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{path} could not be built: {(built.stdout + built.stderr)[-1500:]}")
    sys.path.insert(0, str(copy))
    return getattr(importlib.import_module(package), name)


# Names that torch has dropped since these sources were written.
RENAMED = [(".type().is_cuda()", ".is_cuda()"), ("value.type()", "value.scalar_type()"), (".data<", ".data_ptr<"),
           ("AT_ASSERTM", "TORCH_CHECK"), ("#include <THC/THCAtomics.cuh>", "#include <ATen/cuda/Atomic.cuh>"),
           ("#include <THC/THC.h>", "")]


def peers(deformable_detr, dcnv4):
    """{name: (op with msda.msda's arguments, dtypes)}: ours, the definition, and whatever else is there."""
    ways = {"minDETR": (msda.msda, (torch.float32, torch.float16, torch.bfloat16)),
            "grid_sample": (definition, (torch.float32, torch.float16, torch.bfloat16))}

    def levels(shapes, device):
        sizes = torch.tensor(shapes, device=device)
        return sizes, torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    known = functools.cache(lambda shapes: levels(shapes, "cuda"))        # as in a model: once, and not in every layer

    if deformable_detr:
        apply = published(Path(deformable_detr) / "models/ops", "functions", "MSDeformAttnFunction", RENAMED).apply

        def msda_2020(value, shapes, offsets, logits, reference):
            return apply(value, *known(tuple(shapes)), *msda.sampling(shapes, offsets, logits, reference), 64)
        ways["Deformable-DETR"] = msda_2020, (torch.float32,)
    if dcnv4:
        flash = published(Path(dcnv4) / "DCNv4_op", "DCNv4.functions", "FlashDeformAttnFunction", RENAMED).apply

        def flash_deform(value, shapes, offsets, logits, reference):
            size = torch.tensor([(w, h) for h, w in shapes], device="cuda")[:, None]
            locations = reference[:, :, None, :, None] + offsets / size
            both = torch.cat([locations.flatten(-3).to(value.dtype), logits.flatten(-2)], -1)
            return flash(value, *known(tuple(shapes)), both, 64, offsets.shape[4])
        ways["FlashDeformAttn"] = flash_deform, (torch.float16,)
    try:
        from kernels import get_kernel
        hub = get_kernel("kernels-community/deformable-detr")

        class Hub(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value, sizes, starts, locations, weights):
                ctx.save_for_backward(value, sizes, starts, locations, weights)
                return hub.ms_deform_attn_forward(value, sizes, starts, locations, weights, 64)

            @staticmethod
            def backward(ctx, grad):
                grads = hub.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
                return grads[0], None, None, *grads[1:]

        def hugging_face(value, shapes, offsets, logits, reference):
            return Hub.apply(value, *known(tuple(shapes)), *msda.sampling(shapes, offsets, logits, reference))
        ways["Hugging Face"] = hugging_face, (torch.float32,)
    except Exception as error:                                                     # not installed, or no way to its hub
        print(f"Hugging Face's kernel is not measured: {type(error).__name__}: {str(error)[:100]}")
    return ways


def milliseconds(work, runs):
    """Median time of work(i) on the device, i counting the runs."""
    for i in range(3):
        work(i)
    times = []
    for i in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(i)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def copy_speed(runs):
    """GB/s, read and written, of copying 1 GiB: what memory can give."""
    source, target = torch.empty(2, 2 ** 30, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / milliseconds(lambda i: target.copy_(source), runs) / 1e6


def kept_bytes(op, args):
    """Bytes of the tensors that a call keeps for backward, each memory once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(*args)
    return sum(kept.values())


def bench_gpu(runs, deformable_detr, dcnv4):
    ways = peers(deformable_detr, dcnv4)
    ceiling = copy_speed(runs)
    print(f"copying 1 GiB, read and written: {ceiling:.0f} GB/s. minDETR: time, GB/s of the bytes that any way must move, "
          "their share of the copy's. Peers: time, and how many times minDETR's it is. Kept: for backward, inputs included")
    print(f"{'':41}{'forward':>24}{'backward':>24}{'both':>24}{'kept':>13}")
    for layer, Q in (("encoder", None), ("decoder", 300), ("decoder", 900)):
        for B in (1, 2, 16):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                own = None
                for name, (op, dtypes) in ways.items():
                    if dtype not in dtypes:
                        continue
                    gc.collect()
                    torch.cuda.empty_cache()
                    try:
                        times, moved, kept = measure(op, B, Q, dtype, runs)
                    except torch.cuda.OutOfMemoryError:
                        print(f"{layer} {Q or '':4} B={B:2} {str(dtype)[6:]:9} {name:16} out of memory")
                        continue
                    own = own or times
                    cells = [f"{t:8.3f} ms {t / o:6.2f} x" for t, o in zip(times, own)]
                    if name == "minDETR":                        # of the bytes that any way must move, and the copy's speed
                        rates = [b / t / 1e6 for t, b in zip(times, moved)]
                        cells = [f"{t:8.3f} ms {r:5.0f} {r / ceiling:4.0%}" for t, r in zip(times, rates)]
                    print(f"{layer} {Q or '':4} B={B:2} {str(dtype)[6:]:9} {name:16}" + "".join(f"{c:>24}" for c in cells)
                          + f"{kept / 2 ** 20:9.1f} MiB", flush=True)


def measure(op, B, Q, dtype, runs):
    """Milliseconds (forward, backward, both), bytes that any way must move in them, bytes kept for backward.

    Several sets of inputs take turns, so that they do not lie in the cache from the run before.
    """
    args = with_gradients(inputs(LARGE, B, Q, 8, 32, dtype=dtype, device="cuda"))
    read = sum(a.numel() * a.element_size() for a in args if torch.is_tensor(a))
    out = op(*args)
    written = out.numel() * out.element_size()
    grads = sum(a.numel() * a.element_size() for a in args if torch.is_tensor(a) and a.requires_grad)
    sets = [args] + [with_gradients(args) for _ in range(min(7, int(256e6 // read)))]
    grad = torch.randn_like(out)
    del out

    def forward(i):
        with torch.no_grad():
            op(*sets[i % len(sets)])

    def both(i):
        some = sets[i % len(sets)]
        torch.autograd.grad(op(*some), [some[k] for k in (0, 2, 3)], grad)
    kept = kept_bytes(op, args)
    times = milliseconds(forward, runs), milliseconds(both, runs)
    moved = read + written, written + read + grads
    return (times[0], times[1] - times[0], times[1]), (*moved, sum(moved)), kept


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="timed runs of each way (default: 5 on a CPU, 30 on a GPU)")
    parser.add_argument("--deformable-detr", metavar="PATH", help="a checkout of Deformable-DETR, to measure its kernel")
    parser.add_argument("--dcnv4", metavar="PATH", help="a checkout of DCNv4, to measure FlashDeformAttn")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return bench_cpu(args.runs or 5)
    if args.sanitized:
        return check_sanitized()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"NVRTC {cuda.nvrtc_version()}")
    check_gpu()
    sanitize()
    if verdict.failed:
        raise SystemExit(f"error: {verdict.failed} checks failed: speed is not measured")
    bench_gpu(args.runs or 30, args.deformable_detr, args.dcnv4)


if __name__ == "__main__":
    main()
