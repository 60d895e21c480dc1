"""What only remarks on a value in a schema is left out of what is followed."""

from flowspec_edge.web.json_schema import with_known_formats
from tests.web.served import Json


def test_formats_that_nobody_knows_are_remarks() -> None:
    schema: Json = {
        "properties": {
            "format": {"type": "string", "format": "lower"},
            "when": {"format": "date-time"},
            "which": {"enum": [{"format": "lower"}], "default": {"format": "url"}},
            "others": {"anyOf": [{"items": {"format": "url"}}, True]},
        }
    }
    followed = with_known_formats(schema)
    assert followed == {
        "properties": {
            "format": {"type": "string"},
            "when": {"format": "date-time"},
            "which": {"enum": [{"format": "lower"}], "default": {"format": "url"}},
            "others": {"anyOf": [{"items": {}}, True]},
        }
    }
    assert schema["properties"]["format"] == {"type": "string", "format": "lower"}, "the model is told of it"
