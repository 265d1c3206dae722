"""What the record's training step moves and computes on an H100, counted on a machine without a GPU.

    python records/evidence/roofline.py                   un-looped and looped, by part of the model
    python records/evidence/roofline.py --against=HEAD~1  and what another train_gpt.py counts
    python records/evidence/roofline.py --compile         and each kernel as an H100's machine code
    python records/evidence/roofline.py --n_embd=640 --mlp_dim=2560      any setting of Config

GPT.losses is traced on fake tensors, and inductor lowers, fuses and schedules both passes for
sm_90: each node of its schedule says which bytes its kernel reads and writes and how many FLOPs a
product has. Nothing is run. It needs a CUDA build of torch 2.11 (the GPU it does without), for it
reaches into parts of inductor that move:

    python3 -m venv cu && cu/bin/pip install torch==2.11.0 numpy tiktoken zstandard
    cu/bin/python records/evidence/roofline.py

The prediction: ms = GB / 2.5 of inductor's own kernels + TFLOP / 0.6 + 2.0 for attention in each
block application + 10 for the optimizer and communication: constants that give the public record's
measured 96.0 and 140.9 ms from its model by the same count (two points, four constants: a plausible
reading, no proof). The pointer's FlexAttention, of a batch of two, is taken for 1.2 ms: 0.28 of a
block's FLOPs at half of its rate.
"""
import copy
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import torch  # noqa: E402

from data.dataset import BadInput, Parser, command  # noqa: E402

GB_PER_MS, TFLOP_PER_MS, ATTENTION_MS, REST_MS, POINTER_MS = 2.5, 0.6, 2.0, 10.0, 1.2
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20)
# Parts of the model by what a kernel's operations came from: the first row that matches names it.
# Products and attention are kernels of their own; the others are inductor's, the loss among them:
# what goes over all logits. It is not in the GB of which ms are predicted, as it was a kernel of
# its own in the public record too (of its 9.7 GB inductor counts 7.2: at most 2 a tensor).
LIBRARY = [("MLP's products", ("mlp_",)), ("attention", ("attention",)), ("pointer", ("copies",)),
           ("loss", ()), ("other products", ("",))]
OWN = [("XSA and gate", ("sigmoid",)), ("heads: norm, rotary, gain", ("cos", "split_with_sizes")),
       ("embedding and head", ("embedding",)),
       ("residual stream, norms, mixes, lanes", ("rsqrt", "pow", "where", "add")),
       ("gradients of small vectors, casts", ("",))]


def pretend_gpu() -> None:
    """Makes torch believe in one H100, as far as tracing and scheduling ask."""
    import torch._subclasses.fake_tensor as fake_tensor
    fake_tensor.init_gpu_context = lambda *_, **__: None
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_capability=(9, 0),
        _lazy_init=None, is_initialized=True, get_device_properties=H100, get_device_name=H100.name,
        is_bf16_supported=True, synchronize=None, get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    import triton
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    config.use_static_cuda_launcher = False
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0))


def load_trainer(path: Path):
    """Another train_gpt.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("counted", path)
    module = sys.modules["counted"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count_flops(trainer, model, looped: bool) -> int:
    """Model FLOPs per trained token: 6 per weight of each product, forward and backward; attention
    left out."""
    per_block = sum(bank[0].numel() for bank in (model.qkv, model.o, model.up, model.down))
    ends = model.embed.weight.numel() + model.copy.numel()
    return 6 * (len(trainer.block_order(model.cfg, looped)) * per_block + ends)


def count(trainer, settings: dict, looped: bool, code: dict | None = None) -> dict:
    """-> {"kernels": [(pass, part, is inductor's own, bytes, FLOPs)], "saved": bytes kept for the
    backward pass, "visits": block applications}. With code, adds {name: Triton source} of each
    different kernel to it."""
    from functorch.compile import (aot_function, make_boxed_func,
                                   min_cut_rematerialization_partition)
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils import _pytree as pytree
    post_grad.reinplace_inplaceable_ops = lambda *_, **__: None  # trips over devices that change
    cfg = trainer.Config(**{"vocab_size": 16384, **settings})
    mode = FakeTensorMode()
    gpu = torch.device("cuda", 0)
    kernels = []
    saved = [0]
    ops = torch.ops.roofline

    def up_product(a, b, pre=None):
        return ops.mlp_up(a, b) if pre is None else ops.mlp_dpre(a, b, pre)

    def flex_copies(q, k, tokens, targets, seg):
        return ops.copies(q, k, tokens, targets, seg.cu_seqlens)
    trainer.up_product = up_product
    trainer.flex_copies = flex_copies
    model = trainer.GPT(cfg)
    model.dtype = torch.bfloat16
    model.fused = True
    model.kernel = lambda q, k, v, seg: ops.attention(q, k, v, seg.cu_seqlens)[0]
    names = [name for name, _ in model.named_parameters()]

    def move(x):
        return gpu if isinstance(x, torch.device) else x

    def record(which, node):
        """Adds a node of inductor's schedule to kernels."""
        kind = type(node).__name__
        if type(node.node).__name__ == "MultiOutput" or kind.startswith("Nop"):
            return  # the name of a result or of a whole whose parts are written in place, no kernel
        extern = "Extern" in kind
        origins = [o.name for x in node.get_nodes() if x.node for o in x.node.get_origins()]
        parts = " ".join(origins)
        size = node.get_read_write_buffers_sizes()
        table = LIBRARY if extern else OWN
        part = next(name for name, keys in table if any(key in parts for key in keys))
        if not extern and size > 2 * cfg.row_tokens * cfg.vocab_size:
            part = "loss"
        own = not extern and part != "loss"
        kernels.append((which, part, own, size, node.estimate_flops() or 0))

    def compiler(which):
        def compile_pass(graph, inputs):
            original = copy.deepcopy(graph)
            for node in graph.graph.nodes:
                node.args = pytree.tree_map(move, node.args)
                node.kwargs = pytree.tree_map(move, node.kwargs)
            graph.recompile()
            with mode, torch.no_grad():
                inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu)
                          for x in inputs]
                FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
            if which == "forward":
                results = graph.graph.output_node().args[0]
                kept = {x: x.meta["val"] for x in results if x.op != "placeholder"}
                saved[0] = sum(x.numel() * x.element_size() for x in kept.values())
            with V.set_fake_mode(mode), torch.no_grad():
                post_grad.view_to_reshape(graph)
                _recursive_post_grad_passes(graph, is_inference=False)
                lowered = GraphLowering(graph, example_inputs=inputs,
                                        is_backward=which == "backward")
                with V.set_graph_handler(lowered), DebugContext():
                    lowered.run(*inputs)
                    lowered.init_wrapper_code()
                    lowered._update_scheduler()
                    for node in lowered.scheduler.nodes:
                        record(which, node)
                    if code is not None:
                        wrapper = lowered.wrapper_code
                        wrapper.push_codegened_graph(lowered)
                        wrapper.define_kernel = lambda name, body, *_, **__: code.update(
                            {name: body})
                        lowered.scheduler.codegen()
            return make_boxed_func(original.forward)
        return compile_pass

    def loss(parameters, tokens, targets, cu, pos):
        wrapped = torch.nn.Module()
        wrapped.m, wrapped.forward = model, model.losses
        values = {f"m.{n}": p for n, p in zip(names, parameters)}
        given = (tokens, targets, trainer.Segments(cu, pos, cfg.seq_len), looped)
        return torch.func.functional_call(wrapped, values, given).sum() / cfg.batch_tokens

    with mode:  # on the CPU: gradients of fake CUDA tensors would ask the driver for a stream
        parameters = [torch.empty(p.shape, requires_grad=True) for p in model.parameters()]
        row = torch.zeros(cfg.row_tokens, dtype=torch.long)
        step = aot_function(
            loss, fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
            partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table())
        step(parameters, row, row, torch.zeros(257, dtype=torch.int32), row.int()).backward()
    n = sum(p.numel() for p in model.parameters())
    order = trainer.block_order(cfg, looped)
    return {"kernels": kernels, "saved": saved[0], "visits": len(order), "weights": n,
            "flop": count_flops(trainer, model, looped) * cfg.row_tokens, "cfg": cfg}


def assemble(code: dict) -> list[tuple[str, int, int]]:
    """{name: Triton source} as inductor writes it -> [(name, registers, bytes spilled)] of its
    machine code for sm_90, of the best of the settings between which a GPU would choose. Raises what
    Triton or ptxas raise."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "/dev/stdin"]
    found = []
    for name, body in code.items():
        kernel = getattr(PyCodeCache.load(body.split("'''")[1]), name)
        results = []
        for setting in kernel.configs:
            ptx = kernel._precompile_config(setting).kernel.asm["ptx"]
            said = subprocess.run(command, input=ptx, text=True, capture_output=True,
                                  check=True).stderr
            results.append([int(re.search(rf"(\d+) {x}", said)[1])
                            for x in ("bytes spill stores", "registers")])
        spilled, registers = min(results)
        found.append((name, registers, spilled))
    return found


def define_kernels() -> None:
    """Attention, and the trainer's Triton kernels, as opaque operators: counted by what they read and
    write."""
    ops = torch.ops.roofline

    def op(name, signature, shapes):
        torch.library.define(f"roofline::{name}", signature)
        torch.library.register_fake(f"roofline::{name}", shapes)

    def per_row(x, *_):   # two numbers a row
        return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))

    op("attention", "(Tensor q, Tensor k, Tensor v, Tensor cu) -> (Tensor, Tensor)",
       lambda q, k, v, cu: (q.new_empty(q.shape),
                            q.new_empty(q.size(1), q.size(0), dtype=torch.float32)))
    op("attention_backward", "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
       "Tensor cu) -> (Tensor, Tensor, Tensor)",
       lambda g, q, k, v, o, lse, cu: tuple(x.new_empty(x.shape) for x in (q, k, v)))
    torch.library.register_autograd(
        "roofline::attention",
        lambda ctx, g, _: (*ops.attention_backward(g, *ctx.saved_tensors), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
            *inputs[:3], *output, inputs[3]))
    op("copies", "(Tensor q, Tensor k, Tensor tokens, Tensor targets, Tensor cu) -> (Tensor, Tensor)",
       per_row)
    op("copies_backward", "(Tensor g, Tensor h, Tensor q, Tensor k, Tensor tokens, Tensor targets, "
       "Tensor cu, Tensor a, Tensor b) -> (Tensor, Tensor)",
       lambda g, h, q, k, *_: (torch.empty_like(q), torch.empty_like(k)))
    torch.library.register_autograd(
        "roofline::copies",
        lambda ctx, *g: (*ops.copies_backward(*g, *ctx.saved_tensors), None, None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))
    op("mlp_up", "(Tensor x, Tensor up) -> (Tensor, Tensor)",
       lambda x, up: (x.new_empty(len(x), len(up)), x.new_empty(len(x), len(up))))
    op("mlp_dpre", "(Tensor dy, Tensor down, Tensor pre) -> Tensor",
       lambda dy, down, pre: torch.empty_like(pre))


def totals(x: dict) -> dict:
    """The numbers of one count: GB, kernels, TFLOP, predicted ms."""
    own = [k for k in x["kernels"] if k[2]]
    gb, tflop = sum(k[3] for k in own) / 1e9, x["flop"] / 1e12
    rest = sum(k[3] for k in x["kernels"]) / 1e9 - gb
    ms = gb / GB_PER_MS + tflop / TFLOP_PER_MS + ATTENTION_MS * x["visits"] + POINTER_MS + REST_MS
    return {"inductor's own kernels, GB": gb, "products, attention and loss, GB": rest,
            "saved for backward, GB": x["saved"] / 1e9, "kernels": len(x["kernels"]),
            "of them inductor's own": len(own),
            "products, TFLOP": tflop,
            "predicted ms": ms}


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]])


def read_flags() -> tuple[dict, str, bool]:
    """-> settings of Config, the commit to count too, whether kernels are to be assembled."""
    parser = Parser(prog="roofline.py", description=__doc__)
    parser.add_argument("--against", default="", help="a commit whose train_gpt.py is counted too")
    parser.add_argument("--compile", action="store_true",
                        help="also assemble every kernel of inductor's with ptxas")
    import train_gpt
    for f in fields(train_gpt.Config):
        parser.add_argument(f"--{f.name}", type=f.type, metavar=f.type.__name__,
                            help=f"Config's, {f.default!r}")
    args = vars(parser.parse_args())
    against = args.pop("against")
    assembled = args.pop("compile")
    settings = {k: v for k, v in args.items() if v is not None}
    try:
        train_gpt.Config(**settings)
    except ValueError as e:
        raise BadInput(str(e)) from None
    return settings, against, assembled


def trainers(against: str) -> dict:
    """-> {"": this train_gpt, name of a commit: its}."""
    import train_gpt
    if not against:
        return {"": train_gpt}
    shown = subprocess.run(["git", "show", f"{against}:train_gpt.py"], cwd=ROOT,
                           capture_output=True, text=True)
    if shown.returncode:
        raise BadInput(f"--against={against}: {shown.stderr.strip().splitlines()[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_gpt.py"
        path.write_text(shown.stdout)
        return {"": train_gpt, f"{against}, ": load_trainer(path)}


def main() -> int:
    settings, against, assembled = read_flags()
    if not torch.version.cuda or not torch.__version__.startswith("2.11"):
        raise BadInput(f"roofline.py needs a CUDA build of torch 2.11, here is {torch.__version__}: "
                       "python3 -m venv cu && cu/bin/pip install torch==2.11.0 numpy tiktoken zstandard")
    pretend_gpu()
    define_kernels()
    code = {"un-looped": {}, "looped": {}}
    found = {}
    for name, trainer in trainers(against).items():
        for which in code:
            sources = code[which] if assembled and not name else None
            found[name + which] = count(trainer, settings, which == "looped", sources)
    sums = {name: totals(x) for name, x in found.items()}
    rows = [["", *sums]]
    for key, value in sums["un-looped"].items():
        form = "{:,.1f}" if isinstance(value, float) else "{:,}"
        rows.append([key, *(form.format(x[key]) for x in sums.values())])
    x = found["un-looped"]
    cfg = x["cfg"]
    print(f"{cfg.row_tokens:,} tokens, forward and backward, on one GPU\n\n{table(rows)}\n")
    rows = [["GB (kernels) by part", *found]]
    for part, _ in LIBRARY + OWN:
        by = [[k for k in x["kernels"] if k[1] == part] for x in found.values()]
        rows.append([part, *(f"{sum(k[3] for k in some) / 1e9:.1f} ({len(some)})" for some in by)])
    print(table(rows))
    n = x["weights"]
    largest = max(y["saved"] for y in found.values())
    small = cfg.vocab_size * cfg.n_embd  # the embedding, of which every rank updates all
    print(f"\noptimizer: {(24 * (n - small) / 8 + 28 * small) / 1e9:.2f} GB on a rank of eight (24 and "
          f"28 bytes a weight); between ranks {(4 * (n - small) + 8 * small) / 1e9:.2f} GB")
    # A quarter more than what is saved is held while it runs, 22 bytes a weight always.
    for memory in (8, 24, 80):  # GB
        halvings = next(k for k in range(64) if 1.25 * largest / 2 ** k + 22 * n < 0.9e9 * memory)
        print(f"a GPU of {memory} GB holds rows of {cfg.row_tokens >> halvings:,} tokens")
    for which, sources in code.items():
        if sources:
            made = assemble(sources)
            spilled = [f"{spilled} in {name}" for name, _, spilled in made if spilled]
            print(f"{which}: {len(made)} different kernels are machine code for sm_90, "
                  f"{max(r for _, r, _ in made)} registers at most; spilled bytes: "
                  + (", ".join(spilled) or "none"))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
