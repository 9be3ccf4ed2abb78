"""The table of several evaluations."""

from __future__ import annotations

from string import Formatter

from dora_ray.commands.arguments import EVALUATIONS
from dora_ray.evaluation.table import aligned, name_encoder, percent, show_evaluations
from dora_ray.evaluation.tasks import TASKS, describe_options


def knn(top1, *, lowered=None, unreadable=0):
    return {
        "task": "knn",
        "data": "/images",
        "settings": {"image_size": 32},
        "results": {
            "top1": top1,
            "top1_interval": [top1 - 0.1, top1 + 0.1],
            "top1_by_k": {"20": top1, "10": top1 / 2},
            "temperature": 0.07,
            "k_lowered_to": lowered,
            "chance": 0.1,
            "num_train": 2000,
            "num_test": 500,
            "num_classes": 10,
            "num_unreadable": unreadable,
        },
    }


def test_several_encoders_a_random_one_and_chance_stand_in_one_table():
    text = show_evaluations({"runs/a": knn(0.5), "timm:x": knn(0.25)}, {"random encoder": knn(0.125)})
    lines = text.splitlines()
    assert lines[0] == "nearest neighbors, labeled images /images"
    assert "exp(cosine / 0.07)" in text
    assert "2000 training images" in text
    start = lines.index(next(line for line in lines if line.startswith("encoder")))
    rows = [" ".join(line.split()) for line in lines[start:]]
    assert rows == [
        "encoder top-1 k=20 k=10",
        "runs/a 50.0 (40.0-60.0) 50.0 25.0",
        "timm:x 25.0 (15.0-35.0) 25.0 12.5",
        "random encoder 12.5 (2.5-22.5) 12.5 6.2",
        "most frequent class 10.0 10.0 10.0",
    ]


def test_what_was_left_out_or_lowered_is_noted():
    text = show_evaluations({"a": knn(0.5, lowered=36, unreadable=2)}, {})
    assert "a: skipped 2 unreadable files." in text
    assert "a: k is at most 36, the number of training images." in text


def test_sequences_of_a_single_encoder_have_a_table_of_their_own():
    names = ("j_and_f", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay", "still_j_and_f")
    results = dict.fromkeys((*names, "still_j_mean", "still_f_mean"), 0.5)
    results |= {
        "averaged": "the 1 sequences of L, 2 objects",
        "sequences": {"dog": {"j": 0.4, "f": 0.6, "num_frames": 9}},
    }
    settings = {"short_side": 480, "num_frames": 7, "radius": 12, "num_neighbors": 5, "temperature": 0.1}
    evaluation = {"task": "vos", "data": "/davis", "settings": settings, "results": results}
    text = show_evaluations({"a": evaluation}, {})
    assert "mean over the 1 sequences of L, 2 objects" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["sequence", "J", "F", "frames"],
        ["dog", "40.0", "60.0", "9"],
    ]
    assert "sequence " not in show_evaluations({"a": evaluation, "b": evaluation}, {}).partition("encoder")[2]


def test_cells_are_aligned():
    assert aligned([["a", "1"], ["long", "22"]]) == "a      1\nlong  22"
    assert (percent(None), percent(0.12345)) == ("", "12.3")


def test_an_encoder_is_named_as_it_was_given_and_by_its_checkpoint():
    assert name_encoder("runs/dog", "/x/runs/dog/checkpoints/step-00000007") == "runs/dog (step-00000007)"
    assert name_encoder("export/", "/x/export") == "export/"
    assert name_encoder("timm:vit", "timm:vit") == "timm:vit"


def test_the_command_line_knows_every_task_and_its_options():
    assert tuple(TASKS) == EVALUATIONS
    text = describe_options()
    for name, task in TASKS.items():
        assert callable(task.run)
        assert f"\n{name}: {task.title} (--data: {task.data})" in text
        for option, field in task.options.model_fields.items():
            assert f"  {option} (" in text
            assert field.description, option
    assert "  epochs (100): Passes over the training features." in describe_options("linear")
    assert "vos:" not in describe_options("linear")


def test_the_columns_and_lines_of_a_task_name_each_other():
    for task in TASKS.values():
        for places in task.chance.values():
            assert set(places) <= set(task.columns)


def test_protocols_name_options_or_results():
    """What is in braces and no option has to be in the results: the tests of each task's results see to that."""
    of_results = {
        "knn": {"num_test", "num_classes", "num_train"},
        "linear": {"num_test", "num_classes", "num_train"},
        "corloc": {"num_images"},
        "vos": {"averaged"},
        "objects": {"num_clips"},
        "views": {"num_scenes"},
    }
    for name, task in TASKS.items():
        named = {field for _, field, _, _ in Formatter().parse(task.protocol) if field}
        assert named - set(task.options.model_fields) <= of_results[name]
