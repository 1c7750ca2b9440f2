"""What heads predict: taken from the student's own forward, and from the teacher's heads."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import image_batch, narrow_opts, rich_batch, save_teacher, zoo_cfg
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, Distiller
from ssimkd.losses import KD_LOSS_REGISTRY, Context
from ssimkd.modeling.distiller import Captured
from ssimkd.modeling.meta_arch import capture_backbone
from ssimkd.modeling.paired_maps import paired_outputs
from ssimkd.modeling.predictions import at_cells, capture_heads, common_places
from ssimkd.modeling.several_teachers import build_teachers
from ssimkd.utils.compat import FCOS, model_zoo

KEY = "MODEL.DISTILL"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
DC5 = "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
STUDENTS = {RETINANET: "DistillRetinaNet", PANOPTIC: "DistillPanopticFPN"}
BATCH = rich_batch((64, 64), (64, 96))
COMPARES = {name: set(cls().compares) for name, cls in KD_LOSS_REGISTRY}
OF_HEADS = sorted(name for name, kinds in COMPARES.items() if "maps" not in kinds)
OF_BOX_HEADS = [name for name in OF_HEADS if COMPARES[name] & {"rpn", "roi"}]
OF_DENSE_HEADS = [name for name in OF_HEADS if "dense" in COMPARES[name]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name of a zoo config -> a checkpoint with random weights for it."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def file_for(name, *opts):
        key = str((name, *opts))
        if key not in made:
            path, seed = folder / f"{len(made)}.pth", 100 + len(made)  # not that of a student
            made[key] = save_teacher(zoo_cfg(name, *opts), path, seed)
        return made[key]

    return file_for


def student_of(name, teacher, weights, losses, *opts, teacher_opts=()):
    """A student of a zoo config and a teacher of another one."""
    torch.manual_seed(1)
    cfg = zoo_cfg(
        name,
        *("MODEL.META_ARCHITECTURE", STUDENTS.get(name, "DistillRCNN")),
        *(f"{KEY}.TEACHER.CONFIG", teacher, f"{KEY}.TEACHER.WEIGHTS", weights),
        *(f"{KEY}.TEACHER.OPTS", [*narrow_opts(teacher), *teacher_opts], f"{KEY}.LOSSES", losses),
        *opts,
    )
    return build_model(cfg).train()


def run(model, batch=BATCH, seed=5):
    """Losses, and the captured outputs of the heads."""
    torch.manual_seed(seed)
    with EventStorage(0) as storage, capture_heads(model, model.distiller.kinds) as outputs:
        losses = model(batch)
    return losses, outputs, storage


def reached(losses, model):
    sum(v for k, v in losses.items() if k.endswith("_kd_loss")).backward()
    return {
        n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }


# --- every pair of families ---

PAIRS = {  # student, teacher, loss -> what is compared, or what the error says
    (FASTER, FASTER, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (FASTER, PANOPTIC, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (PANOPTIC, FASTER, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (KEYPOINT, KEYPOINT, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (PANOPTIC, PANOPTIC, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (MASK, MASK, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (C4, DC5, "kd"): ("roi_box", "roi_cls", "rpn_box", "rpn_cls"),
    (RETINANET, RETINANET, "kd"): ("dense_box", "dense_cls"),
    (CASCADE, CASCADE, "dkd"): [f"{p}_stage{k}" for p in ("other", "target") for k in range(3)],
    (FASTER, CASCADE, "dist"): ("roi_inter", "roi_intra"),  # its first stage
    (FASTER, C4, "dist"): ("roi_inter", "roi_intra"),  # other levels, the same proposals
    (CASCADE, FASTER, "dist"): ("roi_inter", "roi_intra"),  # of the first stage alone
    (RETINANET, RETINANET, "dist"): ("dense_inter", "dense_intra"),
    (FASTER, CASCADE, "kd"): "class-agnostic is False in .* set MODEL.DISTILL.KD.ROI_BOX to 0",
    (FASTER, KEYPOINT, "dist"): "the number of classes is 80 in the student and 1 in the teacher; "
    "the teacher's training data has person",
    (FASTER, C4, "kd"): "kd cannot compare an RPN .*: the strides of the levels is",
    (KEYPOINT, FASTER, "dkd"): "the number of classes is 1 in the student and 80 in the teacher",
    (FASTER, RETINANET, "kd"): "compares the predictions of an RPN, and the teacher has none",
    (FASTER, RETINANET, "dkd"): "predictions of a box head .*, and the teacher has none",
    (CASCADE, RETINANET, "kd"): "compares the predictions of an RPN, and the teacher has none",
    (PANOPTIC, RETINANET, "dist"): "predictions of a box head .*, and the teacher has none",
    (RETINANET, CASCADE, "dist"): "predictions of a head of RetinaNet .*, and the teacher has none",
    (RETINANET, PANOPTIC, "kd"): "predictions of a head of RetinaNet .*, and the teacher has none",
    (RETINANET, FASTER, "bckd"): "predictions of a head of RetinaNet .*, and the teacher has none",
    (FASTER, FASTER, "bckd"): "bckd compares .* a head of RetinaNet .*, and the student has none",
    (RETINANET, RETINANET, "dkd"): "dkd compares .* a box head .*, and the student has none",
}  # fmt: skip


@pytest.mark.parametrize("names", PAIRS, ids=lambda x: " ".join(n.rsplit("/")[-1] for n in x))
def test_a_pair_of_detectors_is_compared_or_refused(names, files):
    name, teacher, loss = names
    expected = PAIRS[names]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=f"{KEY}.LOSSES: .*{expected}"):
            build_teachers(student_of(name, teacher, files(teacher), (loss,)))
        return
    losses, _, storage = run(student_of(name, teacher, files(teacher), (loss,)))
    found = {k.split("/")[1] for k in storage.latest() if k.startswith(f"{loss}_kd/")}
    assert found == set(expected)
    assert 0 < losses[f"{loss}_kd_loss"] < math.inf


@pytest.mark.parametrize(
    ("name", "opts", "teacher_opts", "message"),
    [
        (RETINANET, ("MODEL.RETINANET.NUM_CLASSES", 7), (), "number of classes is 7 in .* and 80"),
        (FASTER, ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5), (), "the offset of the anchors is 0.5"),
        (
            RETINANET,
            (),
            ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 3.0]]),
            "the anchors at stride 8 is",
        ),
    ],
)
def test_other_classes_and_anchors_are_refused(name, opts, teacher_opts, message, files):
    path = files(name, *teacher_opts)
    model = student_of(name, name, path, ("kd",), *opts, teacher_opts=teacher_opts)
    with pytest.raises(ConfigError, match=f"{KEY}.LOSSES: kd cannot compare .*{message}"):
        build_teachers(model)


def test_classes_in_another_order_are_refused(files):
    model = student_of(FASTER, FASTER, files(FASTER), ("dist",))
    names = [f"class {i}" for i in range(80)]
    build_teachers(model, names[:20])  # of other data than the head's
    with pytest.raises(ConfigError, match=f"{KEY}.LOSSES: dist .* class 0, .* and person, bicycle"):
        build_teachers(model, names)
    build_teachers(student_of(FASTER, FASTER, files(FASTER), ("ssim",)), names)


def test_a_checkpoint_without_a_head_that_is_needed_is_refused(files, tmp_path):
    weights = torch.load(files(FASTER))["model"]
    del weights["roi_heads.box_predictor.cls_score.bias"]
    torch.save({"model": weights}, tmp_path / "t.pth")
    path = str(tmp_path / "t.pth")
    build_teachers(
        student_of(
            FASTER, FASTER, path, ("kd",), f"{KEY}.KD.ROI_CLS", 0.0, f"{KEY}.KD.ROI_BOX", 0.0
        )
    )
    with pytest.raises(ConfigError, match=f"{KEY}.TEACHER.WEIGHTS: .*box_predictor.cls_score.bias"):
        build_teachers(student_of(FASTER, FASTER, path, ("kd",)))


def test_a_layer_that_the_head_does_not_have_is_refused(files):
    with pytest.raises(ConfigError, match=f"{KEY}.CROSSKD.LAYER is 5, and the .* 4 convolutions"):
        student_of(RETINANET, RETINANET, "", ("crosskd",), f"{KEY}.CROSSKD.LAYER", 5)


# --- what is compared ---


EQUAL = [(FASTER, loss) for loss in OF_BOX_HEADS] + [(CASCADE, "kd")]
EQUAL += [(RETINANET, loss) for loss in OF_DENSE_HEADS]


@pytest.mark.parametrize(("name", "loss"), EQUAL)
def test_a_student_that_is_its_teacher_learns_nothing(name, loss, files):
    model = student_of(name, name, files(name), (loss,))
    model.load_state_dict(torch.load(files(name))["model"])
    losses, _, _ = run(model)
    # the teacher's maps differ by rounding, because its norms are folded into its convolutions
    assert losses[f"{loss}_kd_loss"].item() == pytest.approx(0, abs=1e-3)


def test_the_proposals_are_those_of_the_detectors_own_loss(files):
    model = student_of(FASTER, FASTER, files(FASTER), ("dkd",))
    losses, outputs, _ = run(model)
    batch = Captured(BATCH, *backbone_of(model), model.preprocessing)
    student = model.distiller.match(batch, outputs)[2]["roi"][0]
    labels = student.labels([x["instances"] for x in BATCH])
    assert (labels < 80).any() and (labels == 80).any()
    torch.testing.assert_close(F.cross_entropy(student.logits, labels), losses["loss_cls"])


def backbone_of(model):
    with torch.no_grad():
        images = model.preprocess_image(BATCH).tensor
        return model.backbone(images), images


def test_anchors_and_predictions_have_the_detectors_order():
    model = build_model(zoo_cfg(RETINANET))
    logits = torch.randn(2, 9 * 80, 3, 4)
    rows = at_cells(logits, [(3, 4), (3, 4)], 9)
    assert torch.equal(rows.reshape(2, -1, 80), permute_to_N_HWA_K(logits, 80))
    anchors = model.anchor_generator([torch.zeros(2, 1, 3, 4)] * 5)
    context = Context([(24, 32), (16, 20)], {"p3": 8})
    other = torch.zeros(2, 720, 3, 6)  # a teacher that pads more
    wide = model.anchor_generator([torch.zeros(2, 1, 3, 6)] * 5)
    (cells, places) = common_places(["p3"], [logits], [other], wide, context)["p3"]
    assert cells == [(3, 4), (2, 3)]
    grid = anchors[0].tensor.view(3, 4, 9, 4)
    assert torch.equal(places, torch.cat([grid.flatten(0, 1), grid[:2, :3].flatten(0, 1)]))


def test_cells_outside_the_images_take_no_part():
    logits = torch.randn(2, 6, 3, 4, requires_grad=True)
    with torch.no_grad():
        logits[1, :, 2:], logits[1, :, :, 3:] = float("nan"), float("nan")
    rows = at_cells(logits, [(3, 4), (2, 3)], 2)
    assert rows.shape == (18, 2, 3) and torch.isfinite(rows).all()
    rows.square().sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[1, :, 2:].any()


def test_the_unit_of_the_teachers_deltas_does_not_matter(files):
    def boxes(*scale):
        weights = torch.load(files(FASTER))["model"]
        for part in ("weight", "bias"):
            weights[f"roi_heads.box_predictor.bbox_pred.{part}"] *= scale[0] if scale else 1.0
        path = files(FASTER) + f"{scale}"
        torch.save({"model": weights}, path)
        opts = ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (20.0, 20.0, 10.0, 10.0)) if scale else ()
        model = student_of(FASTER, FASTER, path, ("kd",), teacher_opts=opts)
        return run(model)[2].latest()["kd_kd/roi_box"][0]

    assert boxes(2.0) == pytest.approx(boxes(), rel=1e-5)


@pytest.mark.parametrize("loss", OF_BOX_HEADS)
def test_a_batch_is_the_mean_of_its_images_weighted_by_their_proposals(loss, files):
    model = student_of(FASTER, FASTER, files(FASTER), (loss,))
    build_teachers(model)
    batch = rich_batch((64, 96), (64, 96))

    def compare(images):
        *maps, student, teacher = paired_outputs(model, model.distiller, images)
        parts = model.distiller.compare(*maps, images, 0, (student, teacher))[loss]
        parts.pop("roi_intra", None)  # a correlation over the proposals of the whole batch
        objects = sum(x.scores().sum().item() for x in teacher.get("rpn", {}).values())
        return parts, {"roi": len(student["roi"][0].logits), "rpn": objects}

    together, _ = compare(batch)
    alone = [compare([x]) for x in batch]
    for part, value in together.items():
        kind = "rpn" if part.startswith("rpn") else "roi"
        total = sum(weights[kind] for _, weights in alone)
        mean = sum(parts[part].item() * weights[kind] for parts, weights in alone) / total
        assert value.item() == pytest.approx(mean, rel=1e-4, abs=1e-6)


# --- a training step ---


@pytest.mark.parametrize("name, loss", [(FASTER, "kd"), (RETINANET, "crosskd")])
def test_a_weight_of_0_is_the_detector_to_the_bit(name, loss, files):
    model = student_of(name, name, files(name), (loss,), f"{KEY}.{loss.upper()}.WEIGHT", 0.0)
    plain = student_of(name, name, "", ())
    losses, expected = run(model)[0], run(plain)[0]
    state = torch.get_rng_state()
    for key, value in expected.items():
        assert torch.equal(losses[key], value)
    run(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_reaches_backbone_and_heads(files):
    model = student_of(FASTER, FASTER, files(FASTER), ("kd",))
    assert reached(run(model)[0], model) == {"backbone", "proposal_generator", "roi_heads"}
    model = student_of(RETINANET, RETINANET, files(RETINANET), ("crosskd",))
    losses = run(model)[0]
    losses["crosskd_kd_loss"].backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "head.cls_subnet.4.weight" in names and "head.bbox_subnet.4.weight" in names
    # the convolutions behind the cut and the last layers learn from the ground truth alone
    assert not any(n.startswith(("head.cls_subnet.6", "head.cls_score")) for n in names)


@pytest.mark.parametrize(
    ("name", "losses"),
    [(FASTER, OF_BOX_HEADS), (CASCADE, OF_BOX_HEADS), (RETINANET, OF_DENSE_HEADS)],
)
def test_the_teacher_never_changes(name, losses, files):
    model = student_of(name, name, files(name), losses)
    build_teachers(model)
    teacher = model.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    for seed in range(20):
        optimizer.zero_grad()
        sum(run(model, BATCH[:1], seed)[0].values()).backward()
        optimizer.step()
    assert all(torch.equal(x, before[k]) for k, x in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_only_the_heads_that_a_loss_compares_are_kept_and_hooked(files):
    def kept(*losses):
        model = student_of(FASTER, FASTER, files(FASTER), losses, f"{KEY}.IN_FEATURES", ["p2"])
        build_teachers(model)
        return {name for name, _ in model.distiller.teacher.model.named_children()}

    assert kept("ssim") == {"backbone"}
    assert kept("ssim", "dist") == {"backbone", "roi_heads"}
    assert kept("kd") == {"backbone", "proposal_generator", "roi_heads"}
    model = student_of(CASCADE, CASCADE, files(CASCADE), ("dist",))
    run(model)
    assert not any(module._forward_hooks for module in model.modules())
    children = dict(model.distiller.teacher.model.roi_heads.named_children())
    assert set(children) == {"box_pooler", "box_head", "box_predictor"}
    for name, stages in ((CASCADE, 3), (FASTER, 1)):  # those that the student has
        model = student_of(name, CASCADE, files(CASCADE), ("dist",))
        build_teachers(model)
        heads = model.distiller.teacher.model.roi_heads
        assert len(heads.box_head) == len(heads.box_predictor) == stages
    with capture_backbone(model.backbone), capture_heads(model, ()):
        assert sum(bool(module._forward_hooks) for module in model.modules()) == 1


@pytest.mark.parametrize("loss", OF_HEADS)
def test_no_objects_and_mixed_precision(loss, files):
    name = FASTER if loss in OF_BOX_HEADS else RETINANET
    model = student_of(name, name, files(name), ("ssim", loss), f"{KEY}.IN_FEATURES", ["p3", "p4"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, outputs, _ = run(model, image_batch((64, 64), boxes=0))
    value = losses[f"{loss}_kd_loss"]
    assert value.dtype == torch.float32 and torch.isfinite(value)
    # torch's convolutions in bfloat16 on a CPU can have a gradient of NaN from finite ones
    given = [x for levels in outputs.anchors.values() for x in levels[0]]
    given += [x for stage in outputs.predictions for x in stage]
    gradients = torch.autograd.grad(value, given, allow_unused=True, materialize_grads=True)
    assert any(x.any() for x in gradients) or "cross" in COMPARES[loss]
    assert all(torch.isfinite(x).all() for x in gradients)


def test_no_proposals(files):
    model = student_of(FASTER, FASTER, files(FASTER), OF_BOX_HEADS)
    label = model.roi_heads.label_and_sample_proposals

    def none(proposals, targets):
        sampled = [x[:0] for x in label(proposals, targets)]
        for x in sampled:
            x.proposal_boxes = Boxes(x.proposal_boxes.tensor.view(0, 4))
        return sampled

    model.roi_heads.label_and_sample_proposals = none
    losses, _, storage = run(model)
    assert storage.latest()["kd_kd/roi_cls"][0] == 0
    sum(losses[f"{loss}_kd_loss"] for loss in OF_BOX_HEADS).backward()
    predictor = model.roi_heads.box_predictor
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in predictor.parameters())


def test_several_teachers_predict_each_with_its_own_heads(files):
    def entry(name, losses):
        teacher = {"CONFIG": name, "WEIGHTS": files(name), "OPTS": narrow_opts(name)}
        return {**teacher, "NAME": losses[0], "LOSSES": losses, "IN_FEATURES": ["p3"]}

    teachers = [entry(RETINANET, ["ssim"]), entry(CASCADE, ["dist"])]
    model = student_of(FASTER, "", "", ("ssim",), f"{KEY}.TEACHERS", teachers, teacher_opts=())
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        losses = model(BATCH)
    assert {k for k in losses if "_kd_loss" in k} == {"ssim_kd_loss_ssim", "dist_kd_loss_dist"}
    assert "dist/dist_kd/roi_intra" in storage.latest()


# --- what only later versions of Detectron2 have ---

later = pytest.mark.skipif(FCOS is None, reason="this Detectron2 has no FCOS")
ANCHOR_FREE, SEVEN = "COCO-Detection/fcos_R_50_FPN_1x.py", ["model.num_classes=7"]


@pytest.fixture(scope="module")
def fcos_file(tmp_path_factory):
    """A checkpoint of an FCOS of 7 classes with random weights."""
    cfg = model_zoo.get_config(ANCHOR_FREE).model
    cfg.num_classes = 7
    return save_teacher(cfg, tmp_path_factory.mktemp("teachers") / "fcos.pth")


def fcos_student(teacher, weights, opts, losses):
    """An FCOS of 7 classes."""
    cfg = model_zoo.get_config(ANCHOR_FREE).model
    cfg._target_, cfg.num_classes = "ssimkd.modeling.meta_arch.DistillFCOS", 7
    cfg.distiller = Distiller(
        teacher=dict(config=teacher, weights=weights, opts=opts),
        losses=[KD_LOSS_REGISTRY.get(name)() for name in losses],
    )
    torch.manual_seed(1)
    return instantiate(cfg).train()


@later
def test_fcos_learns_from_fcos(fcos_file):
    model = fcos_student(ANCHOR_FREE, fcos_file, SEVEN, OF_DENSE_HEADS)
    losses, _, storage = run(model, image_batch((64, 64), (64, 96)))
    found = {k.split("_kd/")[1] for k in storage.latest() if k.startswith("kd_kd/")}
    assert found == {"dense_cls", "dense_box", "centerness"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(losses[f"{x}_kd_loss"] > 0 for x in OF_DENSE_HEADS)


@later
@pytest.mark.parametrize(
    ("name", "teacher", "loss", "message"),
    [
        (ANCHOR_FREE, RETINANET, "kd", "the kind of head is FCOS in the student and RetinaNet in"),
        (RETINANET, ANCHOR_FREE, "kd", "the kind of head is RetinaNet in the student and FCOS in"),
        (RETINANET, ANCHOR_FREE, "crosskd", "the kind of head is RetinaNet in the student and FCO"),
        (ANCHOR_FREE, FASTER, "kd", "compares .* a head of RetinaNet .*, and the teacher has"),
        (ANCHOR_FREE, CASCADE, "dkd", "compares .* a box head .*, and the student has"),
        (FASTER, ANCHOR_FREE, "kd", "compares the predictions of an RPN, and the teacher has none"),
        (CASCADE, ANCHOR_FREE, "dist", "compares .* a box head .*, and the teacher has"),
    ],
)
def test_fcos_learns_from_no_other_kind_of_head(name, teacher, loss, message, files, fcos_file):
    with pytest.raises(ConfigError, match=f"{KEY}.LOSSES: {loss} .*{message}"):
        if name == ANCHOR_FREE:
            model = fcos_student(teacher, files(teacher), narrow_opts(teacher), (loss,))
        else:
            opts = (f"{KEY}.TEACHER.OPTS", SEVEN)
            model = student_of(name, teacher, fcos_file, (loss,), *opts)
        build_teachers(model)


@later
def test_the_count_of_a_teachers_batch_norms_by_level_stays(files):
    opts = ("MODEL.RETINANET.NORM", "BN")
    path = files(RETINANET, *opts)
    model = student_of(RETINANET, RETINANET, path, ("crosskd", "kd"), *opts, teacher_opts=opts)
    build_teachers(model)
    norms = [x for x in model.distiller.teacher.model.head.modules() if hasattr(x, "_pos")]
    run(model)
    assert norms and all(norm._pos == 0 for norm in norms)


@later
def test_a_box_head_of_sigmoids_is_refused(files):
    opts = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    model = student_of(FASTER, FASTER, files(FASTER), ("kd",), teacher_opts=opts)
    with pytest.raises(ConfigError, match="a box head with a softmax .* the teacher has none"):
        build_teachers(model)
    with pytest.raises(ConfigError, match="a box head with a softmax .* the student has none"):
        student_of(FASTER, FASTER, files(FASTER), ("dist",), *opts)


def test_what_an_inference_changes_in_place_is_kept_as_the_head_gave_it(files):
    """FCOS turns its head's output into probabilities in place."""
    model = student_of(RETINANET, RETINANET, files(RETINANET), ("kd",)).eval()
    with torch.no_grad(), capture_heads(model, ["dense"]) as outputs:
        features = model.backbone(model.preprocess_image(BATCH).tensor)
        logits, _ = model.head([features[level] for level in model.head_in_features])
        expected = [x.clone() for x in logits]
        for x in logits:
            x.sigmoid_()
    for kept, value in zip(outputs.anchors["dense"][0], expected):
        assert torch.equal(kept, value)


@pytest.mark.parametrize("log", [0, 1])
def test_pictures_during_a_training_step_change_no_loss(log, files):
    """RetinaNet turns the logits of maps of one cell into probabilities in place, for a picture."""
    batch = rich_batch((96, 96))
    found = []
    for period in (0, 1):
        opts = ("VIS_PERIOD", period, f"{KEY}.LOG_GRADIENTS", log)
        model = student_of(RETINANET, RETINANET, files(RETINANET), ("kd", "dist"), *opts)
        losses, *_ = run(model, batch)
        found.append({name: float(value) for name, value in losses.items()})
    assert found[0] == found[1]


def test_the_gradient_ratio_of_crosskd_is_that_at_its_layer(files):
    """It grows as the weight does, without a limit."""
    ratios = []
    for weight in (1.0, 1000.0):
        opts = f"{KEY}.LOG_GRADIENTS", 1, f"{KEY}.CROSSKD.WEIGHT", weight
        model = student_of(RETINANET, RETINANET, files(RETINANET), ("crosskd",), *opts)
        with EventStorage(0) as storage:
            sum(model(BATCH).values()).backward()
        ratios.append(storage.latest()["gradient_ratio"][0])
    layer = model.distiller.layer
    model.log_gradients = 0
    with EventStorage(0), capture_heads(model, ["cross"], [layer]) as outputs:
        losses = model(BATCH)
    given = [x for levels in outputs.features.values() for x in levels]
    norms = []
    for of_crosskd in (True, False):
        side = sum(v for name, v in losses.items() if ("kd" in name) == of_crosskd)
        gradients = torch.autograd.grad(side, given, retain_graph=True)
        norms.append(sum(x.square().sum() for x in gradients) ** 0.5)
    assert ratios[1] == pytest.approx(float(norms[0] / norms[1]), rel=1e-3)
    assert ratios[1] / ratios[0] == pytest.approx(1000, rel=1e-2)
