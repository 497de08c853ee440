"""The house that README draws: which files there are, who imports whom, how long the core is."""
import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = "judge", "engine", "model"
COMMANDS = {"generate", "train_judge", "convert_hf_checkpoint", "quantize", "eval", "benchmark",
            "make_judge_data", "annotate", "train_eagle"}
FOLDERS = "drafters", "gpu_kernels", "evaluation", "judge_data", "formats", "ranks", "demo"
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p
         for p in [*ROOT.glob("*.py"), *(q for f in FOLDERS for q in (ROOT / f).glob("*.py"))]
         if p.name != "__init__.py"}


@functools.cache
def imports(name: str) -> frozenset:
    """Our own files that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return frozenset(found & FILES.keys())


def chain(name: str, above=()) -> list[str]:
    """The longest chain of imports that begins at a file."""
    assert name not in above, f"imported in a circle: {' -> '.join([*above, name])}"
    return [name, *max((chain(n, (*above, name)) for n in imports(name)), key=len, default=[])]


def test_no_cycle_and_no_chain_of_more_than_eight_files():
    longest = max(map(chain, FILES), key=len)
    assert len(longest) <= 8, " -> ".join(longest)
    assert len(longest) > 4  # the imports were found


def test_nothing_imports_a_command():
    for name in FILES:
        assert not imports(name) & COMMANDS, (name, imports(name) & COMMANDS)


def test_the_core_is_short_and_knows_no_more_than_it_needs():
    lines = {name: len(FILES[name].read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 750, lines
    assert imports("common") == set() and imports("judge") == {"common", "rules"}
    assert imports("rules") == set()
    assert imports("model") <= {"common", "linear"}
    assert imports("engine") == {"common", "judge", "model"}


def test_the_top_level_can_be_seen_at_a_glance():
    top = sorted(p.name for p in ROOT.glob("*.py"))
    assert len(top) <= 20, top
    assert {f"{c}.py" for c in (*CORE, *COMMANDS)} <= set(top)


def test_readme_names_every_file_at_the_top_and_every_flag_of_a_rule():
    from load import rule_forms
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for name in [*(n for n in FILES if "." not in n), *(f"{f}/" for f in FOLDERS)]:
        assert name in readme, name
    for form in rule_forms():
        assert f"`{form}`" in readme, form


def test_one_round_stands_on_one_screen_under_four_signposts():
    text = FILES["engine"].read_text()
    at = [text.index(f"# {sign}") for sign in ("1. draft", "2. verify and judge", "3. accept",
                                               "4. next state")]
    assert at == sorted(at) and text[at[0]:at[-1]].count("\n") < 50
