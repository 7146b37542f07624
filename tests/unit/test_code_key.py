"""Keys of code: what it says counts, how it is written does not."""

import pytest

from export.graphs.code_key import code_key

CODE = '''
"""A module."""

import math

LIMIT = 1e-5


def area(radius: float) -> float:
    """Return the area."""
    return math.pi * radius**2  # of a circle


class Shape:
    """A shape."""
'''


@pytest.fixture
def key(tmp_path):
    def of(*texts):
        files = []
        for index, text in enumerate(texts):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            file = folder / f"{index}.py"
            file.write_text(text)
            files.append(file)
        return code_key(files)

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# of a circle", "# of a disc"),
        ('"""Return the area."""\n    return', "return"),
        ('"""A module."""', ""),
        ('    """A shape."""', '    """Another."""'),
        ("math.pi * radius**2", "(math.pi\n        * radius ** 2)"),
        ("\n\n\n", "\n"),
        ("1e-5", "0.00001"),
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(key, old, new):
    assert old in CODE
    assert key(CODE.replace(old, new)) == key(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-5", "1e-6"),
        ("radius**2", "radius**3"),
        ("math.pi * radius", "radius * math.pi"),
        ("-> float", "-> int"),
        ("class Shape:", "class Form:"),
        ("import math", "import cmath as math"),
        ('"""Return the area."""', '"""Return the area."""\n    "a string that is no docstring"'),
    ],
)
def test_everything_else_does(key, old, new):
    assert old in CODE
    assert key(CODE.replace(old, new)) != key(CODE)


def test_where_our_own_modules_lie_does_not_count_but_what_is_imported_of_them(key):
    assert key("from engine.graphspec import A\nimport math") == key(
        "import math\nfrom engine.bundle.graphspec import A"
    )
    assert key("from engine.graphspec import A") != key("from engine.graphspec import B")
    assert key("from engine.graphspec import A") != key("from engine.graphspec import A as B")
    assert key("from elsewhere import A") != key("from nowhere import A")


def test_the_order_of_files_counts(key):
    assert key("a = 1", "b = 2") != key("b = 2", "a = 1")
    assert key("a = 1", "b = 2") != key("a = 1\nb = 2")


def test_the_key_is_the_same_on_every_python(key):
    """It was computed once and is kept: traces that ship carry such keys."""
    assert key(CODE) == KEY


KEY = "2e7279f97eaf8b18d6b7cf2b6c8bf6b68a2c667ba95fdc0b86a2472563f1ac86"
