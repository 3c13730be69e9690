"""Does a file of models still say what the database says?

Pure. Compared is what the modules mean, not how they are laid out: a formatter may have been over the file.
"""

import ast
import difflib


def differences(file: str, now: str) -> list[str]:
    """Tell the lines by which a file differs from what would be written now; none where it says the same.

    Raises:
        SyntaxError: the file is no Python.
    """
    then_said, now_said = _said(file), _said(now)
    if then_said == now_said:
        return []
    lines = difflib.unified_diff(then_said, now_said, "file", "database", lineterm="", n=1)
    return list(lines)


def _said(text: str) -> list[str]:
    module = ast.parse(text)
    # Imports follow from the rest, and tools sort them; the docstring is for people.
    body = [one for one in module.body if not isinstance(one, ast.Import | ast.ImportFrom)]
    if ast.get_docstring(module) is not None:
        body = body[1:]
    return ast.unparse(ast.Module(body, [])).splitlines()
