"""The table that `make train` prints."""

import train_shapes


def test_a_row_per_detector_with_mean_and_deviation():
    runs = {
        "vanilla student": [
            {"AP": 10.0, "AP50": 20.0, "AP75": 5.0},
            {"AP": 14.0, "AP50": 20.0, "AP75": 6.0},
        ],
        "teacher": [{"AP": 70.0, "AP50": 87.4, "AP75": 83.8}],
    }
    head, rule, student, teacher = train_shapes.table(runs).splitlines()
    assert (
        head == "|  | AP | AP50 | AP75 | parameters |" and rule == "| --- | --- | --- | --- | --- |"
    )
    # the deviation of 10 and 14 is sqrt(8), of 5 and 6 sqrt(0.5)
    assert student.startswith("| vanilla student | 12.0 +- 2.8 | 20.0 +- 0.0 | 5.5 +- 0.7 |")
    assert teacher.startswith("| teacher | 70.0 | 87.4 | 83.8 |")


def test_the_student_counts_no_distillation():
    assert train_shapes.parameters("vanilla student") == train_shapes.parameters("SSIM student")
    assert train_shapes.parameters("teacher") > train_shapes.parameters("SSIM student")
