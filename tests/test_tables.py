"""The tables of both READMEs: generated from the committed results, and short where it says so."""

import pytest

from experiments import common, records, tables


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.parent.name)
def test_a_document_quotes_the_committed_results(path):
    text = path.read_text()
    made = tables.filled(text, tables.DOCUMENTS[path])
    assert made == text, "run python -m experiments.tables"


def test_every_table_is_shown_in_full():
    shown = {name for _, name, _ in tables.MARKED.findall(tables.ALL.read_text())}
    quoted = {name for _, name, _ in tables.MARKED.findall(tables.README.read_text())}
    assert quoted <= shown
    assert {name.split("-")[0] for name in shown} == set(tables.MAKERS)


def test_a_choice_has_figures_of_the_full_table_alone():
    """What the short table says stands in the long one, figure by figure."""
    for _, name, _ in tables.MARKED.findall(tables.README.read_text()):
        kind = name.split("-")[0]
        if kind not in tables.CHOICES:
            continue
        path = records.RESULTS / f"{name}.json"
        sources = [tables.MAKERS[kind](path)]
        if kind == "adversarial_training":
            other = "autoattack_benchmark"
            sources.append(tables.MAKERS[other](path.with_name(path.name.replace(kind, other))))
        full = {
            cell.strip()
            for source in sources
            for line in source.splitlines()
            for cell in line.split("|")
        }
        body = tables.CHOICES[kind](path).splitlines()[2:]
        cells = {cell.strip() for line in body for cell in line.strip("|").split("|")}
        # 100 % of itself is what the undefended network has.
        assert cells - full <= {"not run", "100"}, name


def test_tables_are_read_with_empty_cells():
    text = common.markdown(["a", "b", "c"], [["1", "", ""], ["", "2", "x"]])
    assert tables.rows_of(f"Words.\n\n{text}\n\nMore.") == [
        [{"a": "1", "b": "", "c": ""}, {"a": "", "b": "2", "c": "x"}]
    ]


def test_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own"):
        tables.rows_of(common.markdown(["a", "a"], [["1", "2"]]))


def test_tables_stand_side_by_side_and_what_is_not_there_was_not_run():
    left = [{"left": "at", "clean": "1"}, {"left": "sip", "clean": "2"}]
    right = [{"right": "sip", "clean": "3"}]
    found = tables.beside(
        {"l": left, "r": right}, "row", ("at", "sip"), {"l": ["clean"], "r": ["clean"]}
    )
    assert found == [
        {"row": "at", "l: clean": "1", "r: clean": "not run"},
        {"row": "sip", "l: clean": "2", "r: clean": "3"},
    ]


def test_an_unknown_marker_is_refused():
    with pytest.raises(SystemExit, match="no experiment makes this table"):
        tables.filled("<!-- table: nothing-laptop -->\n<!-- end -->", tables.MAKERS)
