"""The call graph: definitions and edges of a few files, written so that each rule shows."""

from collections import Counter
from pathlib import PurePath
from textwrap import dedent

import pytest
import torch

pytest.importorskip("torch_geometric")

from lightning_adam_mini.tasks.data.sources import _is_wanted
from lightning_adam_mini.tasks.graph.data import CallGraph
from lightning_adam_mini.tasks.graph.data.call_graph import find_definitions, mention_edges, word_features

SOURCES = {
    "one/__init__.py": '''
        def open(path):
            """Open the file."""
            return helper(path)

        def helper(path):
            return path.readLines
        ''',
    "one/more.py": """
        class Reader:
            def read(self):
                def inner():
                    return open
                return inner()
        """,
    "two.py": """
        def open(path):
            return helper
        def unused():
            return Reader
        """,
    "three.py": "def open(: no Python",
}


@pytest.fixture
def definitions(tmp_path):
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text), "utf-8")
    return find_definitions(tmp_path, sorted(tmp_path.rglob("*.py")))


def paths(definitions, edges):
    return {(definitions[a].path, definitions[b].path) for a, b in edges.T.tolist()}


def test_functions_and_classes_are_found_with_their_place(definitions):
    found = ["one.open", "one.helper", "one.more.Reader", "one.more.Reader.read", "one.more.Reader.read.inner"]
    assert [one.path for one in definitions] == [*found, "two.open", "two.unused"]
    assert {one.package for one in definitions} == {"one", "two"}


def test_what_is_mentioned_counts_for_all_that_it_stands_in(definitions):
    mentions = {one.path: one.mentions for one in definitions}
    assert mentions["one.open"] == Counter(helper=1, path=1)
    assert mentions["one.more.Reader.read.inner"] == Counter(open=1)
    assert mentions["one.more.Reader.read"] == mentions["one.more.Reader"] == Counter(open=1, inner=1)


def test_words_are_those_of_docstring_and_mentions_but_not_the_own_name(definitions):
    words = {one.path: one.words() for one in definitions}
    assert words["one.open"] == Counter(open=1, the=1, file=1, helper=1, path=1)
    assert words["one.helper"] == Counter(path=1, read=1, lines=1)
    assert words["two.unused"] == Counter(reader=1)


def test_a_name_gives_edges_to_all_of_its_definitions_whatever_the_module(definitions):
    edges = paths(definitions, mention_edges(definitions, range(len(definitions)), max_definitions=2))
    # The `open` of the own package is no nearer than that of the other.
    assert {("one.more.Reader.read.inner", "one.open"), ("one.more.Reader.read.inner", "two.open")} <= edges
    assert {("two.open", "one.helper"), ("two.unused", "one.more.Reader")} <= edges
    assert {(b, a) for a, b in edges} == edges
    assert all(a != b for a, b in edges)


def test_a_name_with_many_definitions_gives_no_edge(definitions):
    edges = paths(definitions, mention_edges(definitions, range(len(definitions)), max_definitions=1))
    assert ("two.open", "one.helper") in edges
    assert ("one.more.Reader.read.inner", "two.open") not in edges


def test_edges_do_not_depend_on_which_package_a_definition_is_in(definitions):
    """The label must not decide whether an edge is there."""
    everything = range(len(definitions))
    before = mention_edges(definitions, everything, max_definitions=2)
    for one in definitions:
        one.package, one.path = "same", "same"
    assert torch.equal(before, mention_edges(definitions, everything, max_definitions=2))


def test_definitions_outside_the_graph_count_as_definitions_of_a_name(definitions):
    """Without `two`, `open` still has two definitions, and gives no edge where one is allowed."""
    kept = [number for number, one in enumerate(definitions) if one.package == "one"]
    edges = mention_edges(definitions, kept, max_definitions=1)
    nodes = [definitions[number] for number in kept]
    assert not {pair for pair in paths(nodes, edges) if "one.open" in pair} - {
        ("one.open", "one.helper"),
        ("one.helper", "one.open"),
    }


def test_rare_words_weigh_more_and_equal_texts_get_equal_features():
    texts = [Counter(common=1, rare=1), Counter(common=1, rare=1), Counter(common=1), Counter(common=1, other=1)]
    features = word_features(texts, 3)
    torch.testing.assert_close(features.norm(dim=1), torch.full((4,), 3**0.5))
    torch.testing.assert_close(features[0], features[1])
    cosines = features @ features.T / 3
    assert cosines[0, 2] < 0.9  # the common word alone does not make them alike
    torch.manual_seed(7)
    assert torch.equal(word_features(texts, 3), features)


def test_drawing_features_leaves_the_generator_alone():
    texts = [Counter(a=1), Counter(b=1), Counter(a=1, b=1)]
    state = torch.get_rng_state()
    word_features(texts, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("argparse.py", True),
        ("json/decoder.py", True),
        ("test/test_json.py", False),
        ("unittest/test/support.py", False),
        ("site-packages/numpy/random.py", False),
        ("encodings/cp1252.py", True),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
    ],
)
def test_sources_of_the_library_alone_are_taken(path, wanted):
    assert _is_wanted(PurePath(path)) is wanted


@pytest.mark.parametrize("options", [{"num_packages": 1}, {"max_definitions": 0}, {"split_seed": -1}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"must be at least 2"):
        CallGraph(**options)


def test_more_packages_than_there_are_are_refused(definitions):
    with pytest.raises(ValueError, match=r"`num_packages` is 3, but there are 2 packages"):
        CallGraph(num_packages=3).build(definitions)


@pytest.mark.slow
def test_the_standard_library_is_a_graph_and_its_split_does_not_follow_the_runs_seed(tmp_path):
    graphs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = CallGraph(cache_dir=str(tmp_path / str(seed)), num_packages=20)
        module.setup("fit")
        graphs.append(module.graph)
    one, other = graphs
    assert torch.equal(one.test, other.test)
    assert torch.equal(one.edge_index, other.edge_index)
    assert torch.equal(one.x, other.x)
    assert one.num_nodes > 5000
    assert one.edge_index.shape[1] > 5 * one.num_nodes
    shares = [len(split) / one.num_nodes for split in (one.train, one.val, one.test)]
    assert shares == pytest.approx([0.54, 0.18, 0.28], abs=1e-3)
    same = (one.y[one.edge_index[0]] == one.y[one.edge_index[1]]).float().mean()
    assert 0.4 < same < 0.7  # edges within a package are frequent, and far from all
