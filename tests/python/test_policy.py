"""Policies: text and JSON round trips, and what is refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpack.codebook_methods import CODEBOOK_BITS, CodebookMethod
from kvpack.methods import DenseMethod, Method, register_method
from kvpack.mustafar import CODE_BITS, PruneMethod
from kvpack.overrides import LARGEST_LAYER, LayerOverride
from kvpack.policy import Policy, list_presets, parse_policy
from kvpack.rotated import ROTATED_BITS, RotatedMethod
from kvpack.uniform import UNIFORM_BITS, UniformMethod

dense = st.just(DenseMethod())
pruned = st.builds(
    PruneMethod,
    st.integers(0, 99).map(lambda percent: percent / 100),
    st.sampled_from(["exact", "kth_value"]),
    st.sampled_from([*CODE_BITS, 16]),
)
uniform = st.builds(
    UniformMethod,
    st.sampled_from([bits for bits in UNIFORM_BITS if bits < 16]),
    st.sampled_from(["per_channel", "per_token"]),
    st.none() | st.sampled_from([32]) | st.integers(1, 2**31 - 1),
    st.sampled_from(["floating", "clamp"]),
    st.just(0.0) | st.sampled_from([0.01, 0.005, 0.29]) | st.floats(0, 1, exclude_max=True),
    st.sampled_from(["pre_rope", "post_rope"]),
    st.booleans(),
)
codebooks = st.builds(
    CodebookMethod,
    st.sampled_from(CODEBOOK_BITS),
    st.sampled_from(["per_channel", "per_token"]),
    st.sampled_from(["calibrated", "normal_float"]),
    st.just(False),
    st.sampled_from([0.0, 0.01, 0.005]),
    st.booleans(),
) | st.builds(CodebookMethod, st.sampled_from(CODEBOOK_BITS), st.just("per_channel"), norm=st.just(True))
rotated = st.builds(
    RotatedMethod, st.sampled_from(ROTATED_BITS), st.sampled_from(["pre_rope", "post_rope"]), st.integers(0, 2**31 - 1)
)
exact_grid = st.builds(UniformMethod, st.just(16), st.sampled_from(["per_channel", "per_token"]))
methods = dense | pruned | uniform | exact_grid | codebooks | rotated
counts = st.sampled_from([0, 1, 2, 32]) | st.integers(0, 2**31 - 1)


@st.composite
def overrides(draw):
    """Layers drawn from few numbers, each of which goes to one of three pairs of methods."""
    owners = draw(st.dictionaries(st.integers(0, 12) | st.integers(0, LARGEST_LAYER), st.integers(0, 2), max_size=8))
    pairs = [draw(st.tuples(methods, methods)) for _ in range(3)]
    order = draw(st.permutations(sorted(owners)))
    return tuple(LayerOverride(((layer, layer),), *pairs[owners[layer]]) for layer in order)


policies = st.builds(Policy, methods, methods, counts, counts, st.sampled_from(["oracle", "causal"]), overrides())


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
        st.sampled_from(
            ["int4", "kivi-2", "mustafar-70-q2", "+", ",", ":", "k:", "v:", "1%", "sink", "window", "-1", "clamp"]
            + [";", ";layers", "0", "3-5", "=", "="]
        )
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
    names = ["fp16", "int8", "int5", "int4", "int3", "int2"]
    names += ["int8+1%", "int5+1%", "int4+1%", "int3+1%", "int2+1%"]
    names += ["kivi-4", "kivi-2", "mustafar-50", "mustafar-70", "mustafar-50-q4", "mustafar-70-q4", "mustafar-70-q2"]
    names += ["nuq4", "nuq4+1%", "nuq3", "nuq3+1%", "nuq2", "nuq2+1%", "nf4", "nf3", "nf2"]
    names += ["turbo-4", "turbo-3", "turbo-2", "klt-3.4", "klt-2.4", "klt-2", "klt-2.4-joint", "klt-2-joint"]
    names += ["klt-1.5-joint", "klt-2.4-fast"]
    assert list(list_presets()) == names
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
    assert parse_policy("mustafar-70-q2+kth_value").value == PruneMethod(0.7, "kth_value", 2)
    assert parse_policy("int4+0.5%").key.outlier_fraction == 0.005
    assert parse_policy("int4+clamp").value.offset == "clamp"
    assert parse_policy("fp16").is_exact and parse_policy("int16").is_exact and not parse_policy("int8").is_exact


def test_keys_and_values_can_differ_and_share_sink_window_and_mode():
    policy = parse_policy("k:int4+1%+sink+window32,v:kivi-2+sink+window32")
    assert policy.key == UniformMethod(4, "per_channel", outlier_fraction=0.01)
    assert policy.value == parse_policy("kivi-2").value
    assert (policy.sink, policy.window, policy.mode) == (1, 32, "oracle")
    assert parse_policy("v:int4,k:int4").to_text() == "int4"


def test_layers_can_differ_and_share_sink_window_and_mode():
    policy = parse_policy(" mustafar-70-q2+sink+window32 ; layers28, 29=fp16; layers0-1=k:mustafar-50-q4,v:int4+1% ")
    assert policy.to_text() == ("mustafar-70-q2+sink+window32;layers0-1=k:mustafar-50-q4,v:int4+1%;layers28-29=fp16")
    assert policy.for_layer(1) == parse_policy("k:mustafar-50-q4+sink+window32,v:int4+1%+sink+window32")
    assert policy.for_layer(29) == parse_policy("fp16+sink+window32")
    assert policy.for_layer(2) == parse_policy("mustafar-70-q2+sink+window32")
    assert policy.method_for("value", 0).outlier_fraction == 0.01
    with pytest.raises(ValueError, match="differs by layer"):
        policy.method_for("key")
    assert parse_policy("int4").for_layer(None) == parse_policy("int4").for_layer(7) == parse_policy("int4")


def test_ranges_of_equal_methods_become_one():
    policy = parse_policy("int4;layers5=int8;layers0,1=int8;layers2-4=int8;layers7=int2")
    assert policy.to_text() == "int4;layers0-5=int8;layers7=int2"
    assert policy == parse_policy("int4;layers7=int2;layers0-5=int8")


@given(policies, st.integers(0, 13))
def test_every_layer_has_one_policy_that_differs_by_layer_no_more(policy, layer):
    one = policy.for_layer(layer)
    claims = [part for part in policy.layers if layer in part]
    assert len(claims) <= 1 and one.layers == ()
    assert (one.key, one.value) == (claims[0].key, claims[0].value) if claims else (policy.key, policy.value)
    assert (one.sink, one.window, one.mode) == (policy.sink, policy.window, policy.mode)


def test_a_policy_is_exact_when_all_its_layers_are():
    assert parse_policy("fp16;layers0=int16").is_exact
    assert not parse_policy("fp16;layers0=int4").is_exact
    assert not parse_policy("int4;layers0=fp16").is_exact


def test_layers_that_a_model_lacks_are_refused_with_those_it_has():
    policy = parse_policy("int4;layers0-1,28-31=int8;layers5=fp16")
    policy.check_layers(range(32))
    with pytest.raises(ValueError, match=r"layers0-1,28-31=int8.*SmolLM2 lacks: it has 30 layers, 0 to 29"):
        policy.check_layers(range(30), "SmolLM2")
    with pytest.raises(ValueError, match="0 layers, none"):
        policy.check_layers(())


def test_documents_of_version_1_are_read_as_they_were_meant():
    prune = {"method": "prune", "sparsity": 0.7, "rule": "exact"}
    old = {
        "schema": "kvpack-policy",
        "version": 1,
        "key": prune,
        "value": prune,
        "sink": 1,
        "window": 0,
        "mode": "oracle",
    }
    policy = Policy.from_json(old)
    assert policy == parse_policy("mustafar-70+sink")
    assert policy.to_json()["version"] == 2 and policy.to_json()["layers"] == []
    with pytest.raises(ValueError, match="layers"):
        Policy.from_json({**old, "layers": []})


def test_sink_alone_means_the_first_token():
    assert parse_policy("int4+sink").sink == 1
    assert parse_policy("int4+sink1").to_text() == "int4+sink"
    assert parse_policy("int4+sink4+causal").mode == "causal"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int6", ["int6", "6", "2, 3, 4, 5, 8, 16"]),
        ("kivi-3", ["kivi-3", "3", "2, 4"]),
        ("uniform-7-per_token-all-pre_rope", ["7", "2, 3, 4, 5, 8, 16"]),
        ("imt4", ["imt4", "int4", "list_presets"]),
        ("mustafa-50", ["mustafa-50", "mustafar-50"]),
        ("INT4", ["INT4", "int4"]),
        ("turbo", ["turbo", "turbo-4"]),
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
        ("mustafar-70-q3", ["mustafar-70-q3", "bits is 3", "1, 2, 4, 8"]),
        ("mustafar-70-q16", ["bits is 16", "1, 2, 4, 8"]),
        ("mustafar-70-q", ["unknown policy", "mustafar-70"]),
        ("mustafar-70-q2+1%", ["no modifier '1%'"]),
        ("int4;", ["names no layers", ";layers0-1,5=SPEC"]),
        ("int4;int8", ["'int8' names no layers"]),
        ("int4;layers=int8", ["'' is no layer", ";layers0-1,5=SPEC"]),
        ("int4;layers0,=int8", ["'' is no layer"]),
        ("int4;layers0", ["names no layers"]),
        ("int4;layersx=int8", ["'x' is no layer"]),
        ("int4;layers-1=int8", ["'-1' is no layer"]),
        ("int4;layers3-1=int8", ["3-1", "empty range"]),
        ("int4;layers0-10000=int8", ["10000", "9999"]),
        ("int4;layers0-3,2=int8", ["layer 2 is given twice", "0-3", "2-2"]),
        ("int4;layers0-3=int8;layers3-5=int2", ["layer 3 is given twice", "layers0-3=int8", "layers3-5=int2"]),
        ("int4;layers0=int6", ["int6", "2, 3, 4, 5, 8, 16"]),
        ("int4;layers0=imt4", ["imt4", "int4"]),
        ("int4;layers0=", ["unknown policy ''"]),
        ("int4+sink;layers0=int8+sink", ["layers0=int8+sink", "before the first ';'"]),
        ("int4;layers0=int8+causal", ["before the first ';'"]),
        (";layers0=int8", ["unknown policy ''"]),
        ("int4+clamp+clamp", ["twice"]),
        ("int4+1%+2%", ["twice"]),
        ("int4+sink+sink4", ["sink twice"]),
        ("int4+causal+causal", ["causal twice"]),
        ("int4+causal+calibrated", ["calibrated, after causal", "one mode"]),
        ("int4+calibrated2", ["unknown modifier 'calibrated2'"]),
        ("kivi-2+calibrated", ["kivi-2 lacks", "intB, nuqB"]),
        ("turbo-3+calibrated", ["turbo-3 lacks"]),
        ("int4+calibrated;layers0=mustafar-50", ["mustafar-50 lacks"]),
        ("nuq7", ["7", "2, 3, 4, 5, 8"]),
        ("nf4+qnorm", ["qnorm", "nuq"]),
        ("nuq3+clamp", ["no modifier 'clamp'"]),
        ("turbo-5", ["turbo-5", "2, 3, 4"]),
        ("turbo-3+1%", ["no modifier '1%'"]),
        ("turbo-3+seed0", ["seed is 0"]),
        ("int16+compat", ["16 bits copy every bit"]),
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
        (lambda: UniformMethod(6, "per_token"), "bits is 6"),
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
        (lambda: PruneMethod(0.5, bits=3), "bits is 3"),
        (lambda: PruneMethod(0.5, bits=True), "bits is True"),
        (lambda: LayerOverride((), DenseMethod(), DenseMethod()), "at least one pair"),
        (lambda: LayerOverride(((0,),), DenseMethod(), DenseMethod()), "pair of first and last"),
        (lambda: LayerOverride(((0, "1"),), DenseMethod(), DenseMethod()), "layer is '1'"),
        (lambda: LayerOverride(((0, 1),), DenseMethod(), "int4"), "value is 'int4'"),
        (lambda: Policy(DenseMethod(), DenseMethod(), layers=("int4",)), "expected a tuple of LayerOverride"),
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
        (lambda d: d.update(version=3), "version is 3.*versions 1 to 2"),
        (lambda d: d.update(version=True), "version is True"),
        (lambda d: d.update(version=[1]), r"version is \[1\]"),
        (lambda d: d.update(layers={}), "layers is {}"),
        (lambda d: d["layers"].append(7), r"layers\[1\] is 7"),
        (lambda d: d["layers"][0].update(range=[0, 1]), r"layers\[0\] has unknown fields.*range"),
        (lambda d: d["layers"][0].update(ranges=[[1, 0]]), r"layers\[0\]: layers 1-0 are an empty range"),
        (lambda d: d["layers"][0].update(ranges=[]), r"layers\[0\]: ranges of layers are \[\]"),
        (lambda d: d["layers"][0]["key"].update(bits=5), r"layers\[0\].key: bits is 5"),
        (lambda d: d["layers"].append(d["layers"][0]), "given twice"),
        (lambda d: d.update(schema="other"), "other"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d.pop("sink"), "sink"),
        (lambda d: d["key"].update(bit=4), "bit"),
        (lambda d: d["key"].update(bits=6), "bits is 6"),
        (lambda d: d["key"].update(bits="4"), "bits is '4'"),
        (lambda d: d["key"].pop("bits"), "bits"),
        (lambda d: d["value"].update(method="magic"), "magic"),
        (lambda d: d["value"].update(method=["uniform"]), "uniform"),
        (lambda d: d.update(key=None), "key is None"),
    ],
)
def test_bad_json_is_refused(change, word):
    data = parse_policy("int4+1%+sink;layers0-1=mustafar-50-q4").to_json()
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
