import errno
import signal

import pytest

from engine.cli.console import EXIT_BUG, EXIT_INTERRUPTED, run_command
from engine.errors import BundleError, InputError, OutputError, RestoreError, UsageError, from_os_error
from engine.units import format_bytes

ACCESS = ("read", "write", "either")


def test_an_error_tells_where_what_and_what_to_do():
    error = BundleError("a file was changed", where="b/unet.onnx", expected="12 bytes", found="11 bytes", fix="rebuild")
    assert str(error).splitlines() == [
        "b/unet.onnx: a file was changed",
        "  expected: 12 bytes",
        "  found:    11 bytes",
        "  to do:    rebuild",
    ]
    assert str(RestoreError("too late")) == "too late"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "cannot write the image: the disk is full"),
        (errno.EROFS, "cannot write the image: the file system is read-only"),
        (errno.EACCES, "cannot write the image: no permission"),
        (errno.EIO, "cannot write the image: Input/output error"),
    ],
)
def test_system_errors_are_translated(number, text):
    assert str(from_os_error(OSError(number, "x"), "out.png", "write the image")).startswith(f"out.png: {text}")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT])
def test_reading_has_another_remedy_than_writing(number):
    fixes = {access: from_os_error(OSError(number, "x"), "in.png", "open it", access).fix for access in ACCESS}
    assert fixes["write"] not in (fixes["read"], fixes["either"])
    assert "write" not in fixes["read"]
    assert "create" not in fixes["read"] + fixes["either"]


def test_the_class_tells_reading_from_writing():
    kinds = [type(from_os_error(OSError(errno.EIO, "x"), "a", "open it", access)) for access in ACCESS]
    assert kinds == [InputError, OutputError, OutputError]


def command(raised):
    def main(arguments):
        if raised is not None:
            raise raised
        return 0

    return main


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (BundleError("no bundle here"), 1),
        (UsageError("no such backend"), 2),
        (MemoryError(), 1),
        (OSError(errno.ENOSPC, "no space", "out.png"), 1),
        (ZeroDivisionError("a bug"), EXIT_BUG),
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
    ],
)
def test_exit_status_and_traceback(raised, status, capsys):
    assert run_command(command(raised), []) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert ("Traceback" in output.err) is (status == EXIT_BUG)
    if isinstance(raised, RestoreError):
        assert output.err == f"error: {raised}\n"


def test_a_file_that_has_vanished_is_not_to_be_created(capsys, tmp_path):
    def main(arguments):
        (tmp_path / "gone.png").read_bytes()
        return 0

    assert run_command(main, []) == 1
    error = capsys.readouterr().err
    assert "gone.png" in error
    assert "create" not in error


@pytest.fixture
def usual():
    """Python's own answer to Ctrl-C, whatever a library in this process has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_ctrl_c(capsys, usual):
    def main(arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("Importing the numpy C-extensions failed") from error

    assert run_command(main, []) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert signal.getsignal(signal.SIGINT) is usual
    assert run_command(command(ImportError("no such library")), []) == EXIT_BUG  # without Ctrl-C


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12_345, "12.3 kB"),
        (999_600, "1 MB"),
        (6_938_000_000, "6.94 GB"),
        (2.4e12, "2400 GB"),
    ],
)
def test_sizes_in_words(count, text):
    assert format_bytes(int(count)) == text


def test_what_comes_from_outside_does_not_steer_a_terminal():
    name, found = "a\x1b]0;owned\x07\u202egpj.exe", "\udcff\r\x9b2J"
    error = InputError("no photo", where=name, found=found, expected="é 写真 ×\nnext")
    assert all(letter.isprintable() or letter == "\n" for letter in str(error))
    assert "\\x1b]0;owned\\x07\\u202egpj.exe" in str(error)
    assert "é 写真 ×\nnext" in str(error)
