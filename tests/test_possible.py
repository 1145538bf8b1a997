"""Pins tools/calling/possible.py: schemas that no call could fit are told, and no others.

pytest tests/test_possible.py
"""

import pytest

from tools.calling.possible import impossible


def having(**city):
    """The parameters of a function with one argument."""
    return {"type": "object", "properties": {"city": city}, "required": ["city"]}


IMPOSSIBLE = [
    (having(type="banana"), "properties.city.type is 'banana': expected one of string"),
    (having(type=[]), "properties.city.type is []"),
    (having(type=[["string"]]), "properties.city.type is"),
    (having(type=None), "properties.city.type is None"),
    (having(enum=[]), "properties.city.enum is []: expected a list"),
    (having(enum="ab"), "properties.city.enum is 'ab'"),
    (having(type="integer", enum=["a", True]), "none of it is of the type 'integer'"),
    (having(type="string", const=5), "const is 5: none of it is of the type 'string'"),
    (having(type="number", minimum=2, maximum=1), "minimum is above its maximum"),
    (having(type="string", minLength="2"), "minLength is '2': expected a number"),
    (having(type="array", items=5), "properties.city.items is 5: expected a JSON schema"),
    (having(type="array", items={"type": "any"}), "properties.city.items.type is 'any': leave"),
    (having(type="dict"), "properties.city.type is 'dict': write object"),
    (having(type="STRING"), "properties.city.type is 'STRING': write string"),
    (having(anyOf=5), "properties.city.anyOf is 5: expected a list of schemas"),
    (having(anyOf=[]), "properties.city.anyOf is []: expected a list of schemas"),
    (having(properties=[]), "properties.city.properties is []: expected an object of schemas"),
    (having(anyOf=[{"type": "string"}, {"type": "x"}]), "properties.city.anyOf[1].type is 'x'"),
    (having(**{"$ref": "#/$defs/City"}), "properties.city.$ref is '#/$defs/City', which leads"),
    (having(**{"$ref": "https://example.org/city.json"}), "leads nowhere"),
    (having(**{"$ref": ["#"]}), "leads nowhere"),
    (having() | {"required": ["town"]}, "required has 'town', which is none of its properties"),
    (having() | {"required": "city"}, "required is 'city': expected a list of names"),
    (having() | {"required": [["city"]]}, "expected a list of names"),
    (
        having(type="object", properties={}, required=["x"], additionalProperties=False),
        "properties.city.required has 'x'",
    ),
    ({"type": "object", "properties": [1]}, "properties is [1]: expected an object of schemas"),
    ({"properties": {}, "$ref": "#/$defs/A", "$defs": {"A": {}}}, "write them as properties"),
    ({"properties": {}, "anyOf": [having()]}, "write them as properties"),
]
POSSIBLE = [
    {"type": "object", "properties": {}},
    having(),
    having(type=["string", "null"], description=5, pattern="(a+)+$", title="City"),
    having(type="integer", enum=[1, 2], minimum=1, maximum=1, default="x"),
    having(type="boolean", const=True),
    having(type="string", enum=None) | {"required": None},
    having(anyOf=[{"type": "string"}, {"type": "null"}], nullable=True),
    having(type="object", additionalProperties={"type": "number"}),
    having(type="object", required=["x"]),  # others are taken there
    having(type="array", prefixItems=[{"type": "number"}], items=False),
    having() | {"required": ["town"], "additionalProperties": True},
    # as pydantic writes a model in a model, and one that holds itself
    having(**{"$ref": "#/$defs/City"}) | {"$defs": {"City": having(**{"$ref": "#/$defs/City"})}},
    having(**{"$ref": "#"}),
    having(allOf=[{"$ref": "#/properties/a~1b"}]) | {"properties": {"a/b": {}, "city": {}}},
    having(**{"$ref": "#/properties/city/anyOf/0", "anyOf": [{}]}),
]


@pytest.mark.parametrize("schema, why", IMPOSSIBLE)
def test_a_schema_that_no_call_fits_is_told(schema, why):
    assert why in impossible(schema)


@pytest.mark.parametrize("schema", POSSIBLE)
def test_schemas_as_clients_send_them_pass(schema):
    assert impossible(schema) is None
