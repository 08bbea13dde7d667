"""Policies: text and JSON round trips, and what is refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpack.methods import UNIFORM_BITS, DenseMethod, Method, PruneMethod, UniformMethod, register_method
from kvpack.policy import Policy, list_presets, parse_policy

dense = st.just(DenseMethod())
pruned = st.builds(
    PruneMethod, st.integers(0, 99).map(lambda percent: percent / 100), st.sampled_from(["exact", "kth_value"])
)
uniform = st.builds(
    UniformMethod,
    st.sampled_from([bits for bits in UNIFORM_BITS if bits < 16]),
    st.sampled_from(["per_channel", "per_token"]),
    st.none() | st.sampled_from([32]) | st.integers(1, 2**31 - 1),
    st.sampled_from(["floating", "clamp"]),
    st.just(0.0) | st.sampled_from([0.01, 0.005, 0.29]) | st.floats(0, 1, exclude_max=True),
    st.sampled_from(["pre_rope", "post_rope"]),
)
exact_grid = st.builds(UniformMethod, st.just(16), st.sampled_from(["per_channel", "per_token"]))
methods = dense | pruned | uniform | exact_grid
counts = st.sampled_from([0, 1, 2, 32]) | st.integers(0, 2**31 - 1)
policies = st.builds(Policy, methods, methods, counts, counts, st.sampled_from(["oracle", "causal"]))


@given(policies)
def test_text_makes_an_equal_policy(policy):
    assert parse_policy(policy.to_text()) == policy
    assert policy.name == policy.to_text()


@given(policies)
def test_json_makes_an_equal_policy(policy):
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


@given(
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(["int4", "kivi-2", "+", ",", ":", "k:", "v:", "1%", "sink", "window", "-1", "clamp"])
    ).map("".join)
)
def test_any_text_is_a_policy_or_a_value_error(text):
    try:
        policy = parse_policy(text)
    except ValueError as error:
        assert str(error)
    else:
        assert parse_policy(policy.to_text()) == policy


def test_presets_are_the_documented_ones_and_their_own_canonical_text():
    names = ["fp16", "int8", "int4", "int3", "int2", "int8+1%", "int4+1%", "int3+1%", "int2+1%"]
    assert list(list_presets()) == [*names, "kivi-4", "kivi-2", "mustafar-50", "mustafar-70"]
    for name, description in list_presets().items():
        assert parse_policy(name).to_text() == name
        assert description


def test_names_stand_for_the_published_layouts():
    assert parse_policy("int4") == Policy(UniformMethod(4, "per_channel"), UniformMethod(4, "per_token"))
    assert parse_policy("int4").key.stage == "pre_rope"
    kivi = parse_policy("kivi-2")
    assert (kivi.key.axis, kivi.key.group, kivi.key.stage) == ("per_channel", 32, "post_rope")
    assert (kivi.value.axis, kivi.value.group) == ("per_token", 32)
    assert parse_policy("mustafar-70").key == PruneMethod(0.7)
    assert parse_policy("mustafar-70").key.stage == "post_rope"
    assert parse_policy("int4+0.5%").key.outlier_fraction == 0.005
    assert parse_policy("int4+clamp").value.offset == "clamp"
    assert parse_policy("fp16").is_exact and parse_policy("int16").is_exact and not parse_policy("int8").is_exact


def test_keys_and_values_can_differ_and_share_sink_window_and_mode():
    policy = parse_policy("k:int4+1%+sink+window32,v:kivi-2+sink+window32")
    assert policy.key == UniformMethod(4, "per_channel", outlier_fraction=0.01)
    assert policy.value == parse_policy("kivi-2").value
    assert (policy.sink, policy.window, policy.mode) == (1, 32, "oracle")
    assert parse_policy("v:int4,k:int4").to_text() == "int4"


def test_sink_alone_means_the_first_token():
    assert parse_policy("int4+sink").sink == 1
    assert parse_policy("int4+sink1").to_text() == "int4+sink"
    assert parse_policy("int4+sink4+causal").mode == "causal"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", ["int5", "5", "2, 3, 4, 8, 16"]),
        ("kivi-3", ["kivi-3", "3", "2, 4"]),
        ("uniform-7-per_token-all-pre_rope", ["7", "2, 3, 4, 8, 16"]),
        ("imt4", ["imt4", "int4", "list_presets"]),
        ("mustafa-50", ["mustafa-50", "mustafar-50"]),
        ("INT4", ["INT4", "int4"]),
        ("turbo", ["turbo", "fp16", "kivi-2"]),
        ("", ["unknown policy ''"]),
        ("int4+", ["unknown modifier ''"]),
        ("int4+widow32", ["widow32", "window32"]),
        ("int4+window", ["window32"]),
        ("int4+sink-1", ["sink is -1"]),
        ("int4+window-1", ["window is -1"]),
        ("int4+window99999999999", ["99999999999"]),
        ("int4+100%", ["100", "below 100 %"]),
        ("int4+0%", ["0 %"]),
        ("int4+-1%", ["-1 %"]),
        ("mustafar-50+1%", ["mustafar-50 has no modifier '1%'"]),
        ("fp16+1%", ["fp16 has no modifier '1%'"]),
        ("int16+1%", ["16 bits copy every bit"]),
        ("mustafar-50+clamp", ["no modifier 'clamp'"]),
        ("int4+kth_value", ["no modifier 'kth_value'"]),
        ("int4+clamp+clamp", ["twice"]),
        ("int4+1%+2%", ["twice"]),
        ("int4+sink+sink4", ["sink twice"]),
        ("int4+causal+causal", ["causal twice"]),
        ("mustafar-100", ["100", "0 to 99"]),
        ("mustafar--1", ["-1", "0 to 99"]),
        ("k:int4", ["k:SPEC,v:SPEC"]),
        ("k:int4,k:int4", ["k:SPEC,v:SPEC"]),
        ("int4,int2", ["k:SPEC,v:SPEC"]),
        ("k:int4+sink,v:int4", ["together", "sink"]),
    ],
)
def test_bad_text_is_refused_with_words_that_help(text, words):
    with pytest.raises(ValueError) as refusal:
        parse_policy(text)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: UniformMethod(5, "per_token"), "bits is 5"),
        (lambda: UniformMethod(True, "per_token"), "bits is True"),
        (lambda: UniformMethod(4, "per_head"), "per_head"),
        (lambda: UniformMethod(4, "per_token", 0), "group is 0"),
        (lambda: UniformMethod(4, "per_token", offset="none"), "offset is 'none'"),
        (lambda: UniformMethod(4, "per_token", outlier_fraction=1.0), "outlier_fraction is 1.0"),
        (lambda: UniformMethod(4, "per_token", outlier_fraction=float("nan")), "nan"),
        (lambda: PruneMethod(1.0), "sparsity is 1.0"),
        (lambda: PruneMethod(-0.1), "sparsity is -0.1"),
        (lambda: PruneMethod(0.555), "whole percent"),
        (lambda: PruneMethod(0.5, "random"), "random"),
        (lambda: Policy("int4", DenseMethod()), "key is 'int4'"),
        (lambda: Policy(DenseMethod(), DenseMethod(), sink=-1), "sink is -1"),
        (lambda: Policy(DenseMethod(), DenseMethod(), window=1.5), "window is 1.5"),
        (lambda: Policy(DenseMethod(), DenseMethod(), mode="future"), "mode is 'future'"),
    ],
)
def test_impossible_parameters_are_refused(make, word):
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        make()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(version=2), "version is 2"),
        (lambda d: d.update(schema="other"), "other"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d.pop("sink"), "sink"),
        (lambda d: d["key"].update(bit=4), "bit"),
        (lambda d: d["key"].update(bits=5), "bits is 5"),
        (lambda d: d["key"].update(bits="4"), "bits is '4'"),
        (lambda d: d["key"].pop("bits"), "bits"),
        (lambda d: d["value"].update(method="magic"), "magic"),
        (lambda d: d["value"].update(method=["uniform"]), "uniform"),
        (lambda d: d.update(key=None), "key is None"),
    ],
)
def test_bad_json_is_refused(change, word):
    data = parse_policy("int4+1%+sink").to_json()
    change(data)
    with pytest.raises(ValueError, match=word):
        Policy.from_json(data)


def test_json_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="object"):
        Policy.from_json([1, 2])


def test_a_method_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="taken by DenseMethod"):

        @register_method
        class Other(DenseMethod):
            pass

    assert issubclass(DenseMethod, Method)


def test_importing_kvpack_loads_neither_torch_nor_transformers():
    code = (
        "import sys, kvpack; from kvpack import parse_policy; parse_policy('int4+1%').to_json(); "
        "print(kvpack.__version__, *({'torch', 'transformers', 'kvpack._native'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["0.1.0"]


def test_every_public_name_is_there():
    import kvpack

    assert set(kvpack.__all__) - {"__version__"} == set(kvpack._HOMES)
    assert set(kvpack.__all__) <= set(dir(kvpack))
    with pytest.raises(AttributeError, match="quantise"):
        _ = kvpack.quantise
