"""Imports go one way, from the first of `LAYERS` to the last: each may import only what comes before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp8moe

PACKAGE = Path(__file__).parent.parent / "fp8moe"

LAYERS = (
    {"checks", "config", "devices", "gate", "torch_op"},
    {"operands"},
    {"kernels"},
    {"rows"},
    {"quantize"},
    {"gemm"},
    {"autograd"},
    {"modules", "doctor"},
    {"distributed"},
    {"integrations"},
    {"int8"},
    {"monitor"},
    {"bench", "demo"},
    {"__main__"},
)


def layer_of(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def imported(path: Path) -> set[str]:
    """The first-level names within fp8moe that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            targets = [node.module] if node.module != "fp8moe" else [f"fp8moe.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
            continue
        names |= {target.split(".")[1] for target in targets if target.startswith("fp8moe.")}
    return names


def test_imports_go_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    public = {*fp8moe.__all__, "__version__"}
    for path in files:
        if path == PACKAGE / "__init__.py":
            continue
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for target in imported(path):
            if target in public:  # through the front door
                assert layer_of(name) > layer_of("autograd"), f"{path} imports the package's public names"
            elif target != name:
                assert layer_of(target) < layer_of(name), f"{path.relative_to(PACKAGE.parent)} imports {target}"


def test_kernels_know_nothing_of_operators_and_who_calls_them_launches_nothing() -> None:
    for path in PACKAGE.rglob("*.py"):
        modules = _modules(path)
        if path.is_relative_to(PACKAGE / "kernels") or path.parent.name == "kernels":
            assert "fp8moe.torch_op" not in modules, path
        else:
            assert not {name for name in modules if name.split(".")[0] == "triton"} - {"triton"}, path
            kernels = {name for name in modules if name.startswith("fp8moe.kernels")}
            assert not kernels or path.parent.name in {"rows", "quantize", "gemm", "int8"}, f"{path} imports {kernels}"


def test_a_hopper_kernel_is_found_by_the_name_of_its_operator() -> None:
    operators = {path.stem for folder in ("rows", "quantize") for path in (PACKAGE / folder).glob("*.py")}
    shared = {"__init__", "launch", "numerics", "gated", "pairs", "long_tiles", "block_sums"}
    assert {path.stem for path in (PACKAGE / "kernels").glob("*.py")} - shared <= operators


def test_an_int8_kernel_is_found_by_the_name_of_its_operator() -> None:
    operators, kernels = ({path.stem for path in (PACKAGE / name).glob("*.py")} for name in ("int8", "kernels/int8"))
    assert kernels - {"numerics", "platform", "products"} <= operators


def test_importing_the_package_needs_neither_triton_nor_the_extras() -> None:
    program = (
        "import sys\n"
        "extras = ('triton', 'rich', 'matplotlib', 'deep_gemm', 'transformers', 'torchtitan')\n"
        "for name in extras: sys.modules[name] = None\n"
        "import torch, fp8moe, fp8moe.__main__\n"
        "out = fp8moe.grouped_mm(torch.ones(3, 128), torch.ones(1, 128, 128), torch.tensor([3], dtype=torch.int32))\n"
        "assert (out == 128).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


NEEDS = {
    "transformers": "transformers 5.24 or newer, below 6 ({}): pip install 'transformers>=5.24,<6'",
    "torchtitan": "torchtitan 0.3 ({}): pip install 'torchtitan==0.3.*'",
}


@pytest.mark.parametrize(
    ("framework", "stub", "found"),
    [
        ("transformers", "None", "import of transformers halted; None in sys.modules"),
        ("transformers", "types.SimpleNamespace(__version__='4.57.0')", "found 4.57.0"),
        ("transformers", "types.SimpleNamespace(__version__='6.0.0.dev0')", "found 6.0.0.dev0"),
        ("torchtitan", "None", "import of torchtitan halted; None in sys.modules"),
        ("torchtitan", "types.SimpleNamespace(__version__='0.2.2')", "found 0.2.2"),
        ("torchtitan", "types.SimpleNamespace(__version__='0.4.0')", "found 0.4.0"),
    ],
)
def test_an_integration_says_what_to_install(framework: str, stub: str, found: str) -> None:
    program = (
        "import sys, types\n"
        f"sys.modules['{framework}'] = {stub}\n"
        f"try: import fp8moe.integrations.{framework}\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, check=True, cwd=PACKAGE.parent, capture_output=True, text=True).stdout
    assert out == f"fp8moe.integrations.{framework} needs {NEEDS[framework].format(found)}\n"


def _modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return direct | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
