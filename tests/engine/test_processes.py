"""Several processes train as one process with the whole batch does."""

import math

import numpy as np
import pytest
import torch
from conftest import image_batch, save_teacher, shapes_cfg
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from processes import in_processes
from ssimkd.engine.finite_steps import FiniteSimpleTrainer
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.utils.compat import create_ddp_model
from test_finite_steps import Model, batch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

# Every anchor and every proposal counts and each image has as many, so that nothing is drawn and
# the detector's losses are means over images, as those of the distillation are.
NOTHING_DRAWN = (
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1024, "MODEL.RPN.POSITIVE_FRACTION", 1.0,
    "MODEL.RPN.NMS_THRESH", 1.0, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1024, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False,
)  # fmt: skip


def share_of(batch):
    """The images that Detectron2's samplers give to this process."""
    return batch[comm.get_rank() :: comm.get_world_size()]


def train(config, teacher_file, images, *opts, seed=0, steps=3):
    """Trains a student of Shapes on this process's share of a batch.

    The second image has no objects.
    """
    torch.manual_seed(seed + comm.get_rank())
    weights = ("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
    model = build_model(shapes_cfg(config, *weights, *opts)).train()
    batch = image_batch(*[(64, 64)] * images)
    batch[1]["instances"] = batch[1]["instances"][:0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapped = create_ddp_model(model, broadcast_buffers=False)
    before = weights_of(model)  # the main process's, everywhere
    trainer = SimpleTrainer(wrapped, [share_of(batch)] * steps, optimizer)
    losses = []
    with EventStorage() as storage:
        trainer.storage = storage
        for trainer.iter in range(steps):
            trainer.run_step()
            losses.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
            storage.step()
    trained = {k: v for k, v in model.named_parameters() if v.requires_grad}
    return {
        "losses": losses,
        "before": before,
        "after": weights_of(model),
        "trained": list(trained),
        "without_gradient": [k for k, v in trained.items() if v.grad is None],
    }


def weights_of(model):
    return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def alone(teacher_file):
    """One process, three steps of 12 images with the zoo's frozen batch norms."""
    args = ("ssimkd", teacher_file, 12, "MODEL.RESNETS.NORM", "FrozenBN", *NOTHING_DRAWN)
    return args, train(*args)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_train_as_one_with_the_whole_batch(alone, count):
    args, expected = alone
    found = in_processes(count, train, *args)
    # the metrics that the main process logs are those of the whole batch
    for losses, whole in zip(found[0]["losses"], expected["losses"]):
        assert {"ssim_kd_loss", "loss_rpn_cls", "loss_box_reg"} <= set(losses)
        assert_same(losses, whole, rtol=1e-5)
    moved = max(abs(expected["after"][k] - v).max() for k, v in expected["before"].items())
    assert moved > 1e-2
    for result in found:
        # three steps of a random network amplify rounding; they differ by 0.3 % of their way
        assert_same(result["after"], expected["after"], rtol=1e-5, atol=1e-2 * moved)


def part_of(parameter):
    """The adapter of a level or the loss that a parameter of a student belongs to."""
    return ".".join(parameter.split(".")[:3])


@pytest.mark.parametrize(
    ("config", "teacher", "kinds"),
    [
        ("ssimkd", "teacher", {"maps", "rpn", "roi"}),
        ("retinanet_compare", "retinanet_teacher", {"dense", "cross"}),
    ],
)
def test_every_loss_and_adapter_steps_with_the_student(config, teacher, kinds, tmp_path):
    weights = save_teacher(shapes_cfg(teacher, "MODEL.WEIGHTS", ""), tmp_path / "teacher.pth")
    losses = [name for name, cls in KD_LOSS_REGISTRY if kinds & set(cls().compares)]
    opts = ("MODEL.DISTILL.LOSSES", losses, "MODEL.DISTILL.ADAPTER", "conv1x1")
    opts += ("MODEL.DISTILL.INHERIT", ())
    # DistributedDataParallel would raise in the second step if a parameter had no gradient in the
    # first one; the second process has no objects at all
    first, second = in_processes(2, train, config, weights, 2, *opts)
    assert {f"{name}_kd_loss" for name in losses} <= set(first["losses"][0])
    assert not first["without_gradient"] and not second["without_gradient"]
    trained = [k for k in first["trained"] if k.startswith("distiller.")]
    moved = [k for k in trained if (first["after"][k] != first["before"][k]).any()]
    assert set(map(part_of, moved)) == set(map(part_of, trained))
    assert any(trained) == ("maps" in kinds)
    for k in first["after"]:
        assert k.split(".")[-1].startswith(("running_", "num_")) or np.array_equal(
            first["after"][k], second["after"][k]
        ), k


def skip_steps(allowed):
    """Takes four steps. In the second one, only the second process has a loss that is NaN."""
    batches = [batch(0), batch(1, value=math.nan if comm.get_rank() else 1.0), batch(2), batch(3)]
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = FiniteSimpleTrainer(create_ddp_model(model), batches, optimizer, skip=allowed)
    try:
        trainer.train(0, len(batches))
    except FloatingPointError as error:
        return str(error)
    return trainer.skipped, model.weight.tolist()


def test_all_processes_leave_out_the_same_step():
    first, second = in_processes(2, skip_steps, 1)
    assert first == second and first[0] == 1
    # the first process has a finite loss, and the same gradient as the second
    first, second = in_processes(2, skip_steps, 0)
    assert "(iteration 1, images: 1.jpg)" in first and second.startswith("loss_b is nan")


def sent_in_a_step(teacher_file):
    """Numbers that DistributedDataParallel sends, and those of the student's that are trained."""
    weights = ("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
    model = build_model(shapes_cfg("ssimkd", *weights)).train()
    wrapped, sizes = create_ddp_model(model, broadcast_buffers=False), []

    def send(_, bucket):
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, send)
    with EventStorage():
        torch.stack(list(wrapped(image_batch((64, 64))).values())).sum().backward()
    return sum(sizes), sum(x.numel() for x in model.parameters() if x.requires_grad)


def test_a_step_sends_the_students_gradients_and_nothing_of_the_teacher(teacher_file):
    for sent, trained in in_processes(2, sent_in_a_step, teacher_file):
        assert sent == trained > 100_000
