"""Run cases of one op in Triton's interpreter: python -m tests.kernels.interpreted <op> quick|slow.

Cases are those of `tests/kernels/interpreted_<op>.py`: its `cases()` yields (name, callable), and
a callable raises where its kernel is wrong; those named in its `SLOW`, if it has one, are slow.
TRITON_INTERPRET must be 1 before Triton is imported, hence a process of its own;
`test_interpreted.py` starts one an op and part.
"""

import importlib
import os
import sys

import torch

from tests.kernels.compare import run_fwd_bwd


def count_loops_by_tensors():
    """Let a kernel's loop end at a value: numpy 2.4 refuses int() of an array with one element."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_language = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        patch_language(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch


def allow_cpu(*backends):
    """Take the device out of their `why_not`: the op itself then picks them, as on a GPU."""
    for backend in backends:
        backend.available = lambda device: None


def check_graphs(function, call):
    """Compiled whole and exported, an op gives what it gives eagerly, and stays one node."""
    tensors = {n: t for n, t in call.arguments.items() if isinstance(t, torch.Tensor)}
    options = {n: v for n, v in call.arguments.items() if n not in tensors}

    class Model(torch.nn.Module):
        def forward(self, **tensors):
            return function(**tensors, **options)

    def copies():
        return {n: t.clone() for n, t in tensors.items()}

    with torch.no_grad():
        want = torch.utils._pytree.tree_leaves(function(**copies(), **options))
        compiled = torch.compile(Model(), fullgraph=True, backend="eager")
        exported = torch.export.export(Model(), (), copies())
        for graph in (compiled, exported.module()):
            got = torch.utils._pytree.tree_leaves(graph(**copies()))
            assert all(map(torch.equal, got, want))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"hybridzoo.{function.op.name}_triton.default" in names, names


def check_gradient_graphs(function, call):
    """Compiled whole with its gradients, and exported where a parameter needs one."""
    want = run_fwd_bwd(function, call)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        got = run_fwd_bwd(compiled, call)
        # a gradient that nobody wants is a zero here, which a kernel may add
        assert all(torch.allclose(got[name], t, rtol=1e-6, atol=1e-6) for name, t in want.items())

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(call.arguments["weight"].clone())

        def forward(self, x):
            return function(**call.having(x=x, weight=self.weight).arguments)

    model, x = Model(), call.arguments["x"]
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x)[0], model(x)[0])


def main(op, part):
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("TRITON_INTERPRET is not 1; tests/kernels/test_interpreted.py sets it.")
    # fills what torch.empty returns with NaN, as tests/conftest.py does elsewhere
    torch.use_deterministic_algorithms(True)
    count_loops_by_tensors()
    n_cases, module = 0, importlib.import_module(f"tests.kernels.interpreted_{op}")
    for name, case in module.cases():
        if (name in getattr(module, "SLOW", ())) != (part == "slow"):
            continue
        # before it runs: the last line names the case of a traceback, and of a hang
        sys.stderr.write(f"{op}: {name}\n")
        case()
        n_cases += 1
    sys.stdout.write(f"{n_cases} cases passed\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
