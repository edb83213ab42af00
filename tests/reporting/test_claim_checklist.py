from vessel.reporting.claim_checklist import ITEMS, claim_table


def answers(report, limits=()):
    return {int(row[0].main[0]): row[2].main[0] for row in claim_table(report, limits).rows}


def test_all_items_of_the_update_are_there_and_most_are_the_authors(report):
    texts = answers(report)
    assert list(texts) == list(ITEMS) == list(range(1, 45))
    of_authors = {number for number, text in texts.items() if text == "To be written by the authors."}
    assert of_authors >= {2, 3, 4, 5, 6, 8, 13, 15, 16, 17, 18, 21, 34, 36, 41, 42, 44}  # nothing of these is in a run
    assert not of_authors & {1, 7, 10, 12, 19, 20, 22, 23, 24, 25, 26, 28, 29, 32, 35, 37, 39}


def test_items_hold_the_facts_of_the_run(report):
    texts = answers(report, ["few patients"])
    assert texts[20] == "No patient is in two parts."
    assert "7f84eb2d3c10" in texts[7]
    assert "learning rate 4e-05" in texts[25]
    assert "most steps" not in texts[25]  # -1 is no limit
    assert "Dice, IoU, precision" in texts[28].replace("Precision", "precision")
    assert "Scored: 30 images" in texts[35]
    assert texts[40] == "few patients"


def test_a_split_that_is_not_by_patient_is_admitted(report):
    assert "were trained on" in answers(report | {"unit": "block"})[20]


def test_internal_and_external_data_are_distinguished(report):
    assert answers(report)[33] == "To be written by the authors."
    other = answers(report | {"data": report["data"] | {"same_as_run": False}})
    assert other[32] == "To be written by the authors."
    assert "not the data set of a training run" in other[33]
