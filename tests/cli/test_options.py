"""Values on the command line for which typer has no type."""

import pytest
import typer
from support.command_line import run

from exporters.cli.options import axis_range, axis_size, names, numbers


def test_what_is_read() -> None:
    assert names("query,value") == ["query", "value"]
    assert names("re:.*{1,2}") == ["re:.*{1,2}"]
    assert numbers("8") == [8]
    assert numbers("1, 8") == [1, 8]
    assert axis_size("past=0") == ("past", 0)
    assert axis_range("batch=1:8:32") == ("batch", (1, 8, 32))
    assert axis_range("past_sequence=0:64:128") == ("past_sequence", (0, 64, 128))
    assert axis_range(" sequence = 128 ") == ("sequence", (128, 128, 128))


@pytest.mark.parametrize("text", ["batch", "batch=1:2", "=1:2:3", "batch=a:b:c", "batch=1:2:3:4", "batch=-1:2:3"])
def test_a_range_of_another_form(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"^'{text}' is not AXIS=MIN:OPT:MAX, such as batch=1:8:32"):
        axis_range(text)


@pytest.mark.parametrize("text", ["batch=0:0:0", "batch=3:2:4", "batch=1:5:4"])
def test_a_range_out_of_order(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="sizes must be the smallest, usual and largest, in this order"):
        axis_range(text)


@pytest.mark.parametrize(
    ("command", "option", "text", "rule"),
    [
        ("bench a.onnx", "--batch", "1,x", "must be numbers, as in 1,8"),
        ("bench a.onnx", "--sequence", "1,,2", "must be numbers, as in 1,8"),
        ("bench a.onnx", "--axis", "past", "must be NAME=SIZE, as in past_length=0"),
        ("export model -o x.onnx", "--shapes", "batch", "is not AXIS=MIN:OPT:MAX"),
    ],
    ids=["batch", "sequence", "axis", "shapes"],
)
def test_a_refused_text_is_named_with_its_option(command: str, option: str, text: str, rule: str) -> None:
    result = run(*command.split(), option, text)
    assert result.returncode == 2
    assert f"Invalid value for '{option}': '{text}' {rule}" in result.stderr
    assert "Traceback" not in result.stderr
