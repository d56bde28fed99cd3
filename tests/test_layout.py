"""The module keeps the promises of its own table of contents."""

import ast
import inspect
import re
import statistics
import symtable

import aiosqlite
import minio

import videofly as v

SOURCE = (v.HERE / "videofly.py").read_text()
TREE = ast.parse(SOURCE)
LISTED = re.findall(r"^ +(\d+)  (\w+(?: \w+)*)(.*)$", ast.get_docstring(TREE, clean=False), re.M)
CONTENTS = {int(number): title for number, title, _ in LISTED}
PURE = {int(number) for number, _, promise in LISTED if promise.endswith("(pure)")}
RULE = "# " + "-" * 75
BANNERS = {
    SOURCE[: found.start()].count("\n") + 1: (int(found[1]), found[2])
    for found in re.finditer(rf"^{RULE}\n# (\d+)  (.+)\n{RULE}$", SOURCE, re.M)
}
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def section(line):
    return max((number for start, (number, _) in BANNERS.items() if start <= line), default=0)


def called(title):
    return next(number for number, name in CONTENTS.items() if name == title)


def nodes(kind, sections):
    return [node for node in ast.walk(TREE) if isinstance(node, kind) and section(node.lineno) in sections]


def names_defined():
    """(name, section) of everything at module level."""
    for node in TREE.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, section(node.lineno)
            case ast.Assign():
                parts = [part for target in node.targets for part in ast.walk(target)]
                yield from ((part.id, section(node.lineno)) for part in parts if isinstance(part, ast.Name))
            case ast.AnnAssign():
                yield node.target.id, section(node.lineno)


def globals_used(block):
    """(function or class, name) of each global that one refers to; elsewhere importing holds the order."""
    for inner in block.get_children():
        yield from ((inner, symbol.get_name()) for symbol in inner.get_symbols() if symbol.is_global())
        yield from globals_used(inner)


def length(function):
    return function.end_lineno - function.lineno + 1


def test_the_contents_match_the_banners():
    assert list(CONTENTS.items()) == list(BANNERS.values())
    assert list(CONTENTS) == list(range(1, len(CONTENTS) + 1))
    assert {CONTENTS[number] for number in PURE} >= {"Catalogue", "Ledger", "Accounts", "Videos"}


def test_nothing_is_defined_twice():
    names = [name for name, _ in names_defined()]
    assert [name for name in names if names.count(name) > 1] == []


def test_a_section_uses_only_the_ones_above_it():
    home, module = dict(names_defined()), symtable.symtable(SOURCE, "videofly.py", "exec")
    used = [(block.get_lineno(), block.get_name(), name) for block, name in globals_used(module)]
    assert [use for use in used if home.get(use[2], 0) > section(use[0])] == []


def test_no_function_is_longer_than_a_screen():
    assert [f"{function.name}: {length(function)}" for function in FUNCTIONS if length(function) > 70] == []


def test_most_functions_are_seen_at_a_glance():
    lengths = list(map(length, FUNCTIONS))
    assert statistics.median(lengths) < 8
    assert statistics.quantiles(lengths, n=10)[-1] < 25


def test_the_book_is_short():
    """Its definitions lie one blank line apart, everywhere; banners stand on what they introduce."""
    assert SOURCE.count("\n") < 4500
    assert "\n\n\n" not in SOURCE


def test_the_pure_sections_touch_neither_clock_nor_network_nor_chance():
    impure = {"time", "os", "httpx", "asyncio", "aiosqlite", "random", "App", "Litestar", "Request", "log"}
    assert [f"{name.lineno}: {name.id}" for name in nodes(ast.Name, PURE) if name.id in impure] == []
    dice = [name.lineno for name in nodes(ast.Name, PURE) if name.id == "secrets"]
    throwers = [f.name for f in FUNCTIONS for line in dice if f.lineno <= line <= f.end_lineno]
    assert throwers == ["new_api_key"]


def test_the_pure_sections_never_ask_what_time_it_is():
    asking = {"now", "utcnow", "today", "time", "monotonic"}
    assert [f"{part.lineno}: {part.attr}" for part in nodes(ast.Attribute, PURE) if part.attr in asking] == []
    assert re.findall(r"'now'|CURRENT_\w+|unixepoch\(\)|random\(", (v.HERE / "schema.sql").read_text()) == []


def test_no_pure_function_waits():
    assert nodes(ast.AsyncFunctionDef | ast.Await, PURE) == []


def test_handlers_hold_no_sql():
    hands = {number for number in CONTENTS if number >= called("App")}
    texts = [part.value for part in nodes(ast.Constant, hands) if isinstance(part.value, str)]
    held = [text for text in texts if re.search(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|PRAGMA)\b", text)]
    assert [text for text in held if not re.match(r"PRAGMA (integrity|foreign_key)_check", text)] == []


def test_only_the_database_section_opens_a_database():
    openers = {"sqlite3.connect", "aiosqlite.connect", "Thread", "connect"}
    opened = [call.lineno for call in nodes(ast.Call, CONTENTS) if ast.unparse(call.func) in openers]
    assert {section(line) for line in opened} == {called("Database")}
    assert [path.name for path in v.HERE.glob("*.py")] == ["videofly.py"]


def test_what_thread_uses_of_aiosqlite_is_there():
    assert set(re.findall(r"self\.(_\w+)", inspect.getsource(v.Thread))) == {"_execute", "_conn"}
    assert inspect.iscoroutinefunction(aiosqlite.Connection._execute)
    assert [*inspect.signature(aiosqlite.Connection._execute).parameters] == ["self", "fn", "args", "kwargs"]
    assert isinstance(aiosqlite.Connection._conn, property)


def test_what_the_bucket_uses_of_minio_is_there():
    used = set(re.findall(r"self\.client\.(_\w+)", inspect.getsource(v.BucketStorage)))
    assert used == {"_list_multipart_uploads", "_abort_multipart_upload"}
    parameters = {name: [*inspect.signature(getattr(minio.Minio, name)).parameters][:4] for name in used}
    assert parameters["_abort_multipart_upload"] == ["self", "bucket_name", "object_name", "upload_id"]
    assert parameters["_list_multipart_uploads"][:2] == ["self", "bucket_name"]
