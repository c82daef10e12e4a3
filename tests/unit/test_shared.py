"""Errors pickle and map to statuses, names stay in their folder, tokenizers are compared by field."""

from __future__ import annotations

import json
import pickle
import shutil

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage import errors
from tutelage.identity import (
    chat_template_digest,
    require_same_tokenizer,
    tokenizer_digests,
    vocabulary_size,
    weights_digest,
)
from tutelage.names import check_name
from tutelage.rpc.transport import bind, error_of_refusal, refusal_of_error, status_code

ALL_ERRORS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TutelageError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_errors_pickle_with_message_and_field(kind):
    back = pickle.loads(pickle.dumps(kind("k is 0", "signal.k")))
    assert (type(back), back.message, back.field, str(back)) == (kind, "k is 0", "signal.k", "signal.k: k is 0")


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_has_a_status_and_a_builtin_base(kind):
    assert status_code(kind("x")) is not grpc.StatusCode.OK
    assert kind.exit_code in (1, 2, 3, 4)
    assert kind is errors.TutelageError or len(kind.__mro__) > len(errors.TutelageError.__mro__) + 1


@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.NotServed, errors.Overloaded, errors.Unreachable])
def test_a_refusal_becomes_the_same_error_at_the_peer(kind):
    back = error_of_refusal(refusal_of_error(kind("k is 0", "signal.k")))
    assert (type(back), back.message, back.field) == (kind, "k is 0", "signal.k")


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../../b", "a\0b", "~", "", ".", "..", "a" * 65, "Ü", "a b", "a\n"])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(errors.ConfigurationError, match="not a name"):
        check_name(name, "students.id")


@given(st.text(max_size=80))
def test_an_accepted_name_is_one_plain_component(name):
    try:
        check_name(name, "id")
    except errors.ConfigurationError:
        return
    assert "/" not in name
    assert name not in (".", "..")
    assert 1 <= len(name) <= 64


def test_tokenizers_that_differ_in_one_merge_are_told_apart_by_field(tiny_model, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    content = json.loads((changed / "tokenizer.json").read_text())
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (changed / "tokenizer.json").write_text(json.dumps(content))
    require_same_tokenizer(tokenizer_digests(tiny_model), tokenizer_digests(tiny_model))
    with pytest.raises(errors.IdentityMismatch, match="differ in merges;"):
        require_same_tokenizer(tokenizer_digests(tiny_model), tokenizer_digests(changed))


def test_merges_written_as_pairs_or_as_strings_are_the_same(tiny_model, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(tiny_model, old)
    content = json.loads((old / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_digests(old) == tokenizer_digests(tiny_model)


def test_identity_of_a_checkpoint(tiny_model, tmp_path):
    assert vocabulary_size(tiny_model) == 512
    assert len(chat_template_digest(tiny_model)) == len(weights_digest(tiny_model)) == 64
    assert chat_template_digest(tmp_path) == ""
    with pytest.raises(errors.DataError, match="safetensors"):
        weights_digest(tmp_path)
    with pytest.raises(errors.DataError, match=r"tokenizer\.json"):
        tokenizer_digests(tmp_path)


async def test_servers_listen_on_loopback_unless_told():
    server = grpc.aio.server()
    for host in ("127.0.0.1", "localhost", "::1"):
        assert bind(server, host, 0, insecure=False) > 0
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(errors.ConfigurationError, match="--insecure"):
            bind(server, host, 0, insecure=False)
    await server.stop(None)


def test_a_chat_template_is_the_same_wherever_it_stands(tmp_path):
    text = "{% for message in messages %}\r\n{{ message.content }}{% endfor %}"
    named = [{"name": "tools", "template": "other"}, {"name": "default", "template": text}]
    for name, template in (("one", text), ("several", named)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "chat_template.jinja").write_bytes(text.encode())
    assert len({chat_template_digest(tmp_path / name) for name in ("one", "several", "file")}) == 1
