"""A LazyConfig of the Shapes data's student, which has the networks of configs/shapes."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.modeling import GeneralizedRCNN
from ssimkd import Distiller, DistillMixin, add_ssimkd_config
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo


class Vanilla(GeneralizedRCNN):
    """The student without a teacher, which has the same parameters."""

    def __init__(self, vis_period=0):
        cfg = get_cfg()
        add_ssimkd_config(cfg)
        cfg.merge_from_file("configs/shapes/vanilla.yaml")
        super().__init__(**{**GeneralizedRCNN.from_config(cfg), "vis_period": vis_period})


class Student(DistillMixin, Vanilla):
    """The student."""


optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
train = model_zoo.get_config("common/train.py").train

dataloader.train.dataset.names = "ssimkd_shapes_train"
dataloader.test.dataset.names = "ssimkd_shapes_val"
dataloader.train.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=96)]
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=96)]
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = dataloader.test.num_workers = 0

model = L(Student)(
    distiller=L(Distiller)(
        teacher=dict(config="configs/shapes/teacher.yaml", weights="configs/shapes/teacher.pth"),
        losses=[L(SSIMLoss)()],
        in_features=["p2", "p3", "p4", "p5"],
    )
)
optimizer.lr = 0.01
train.device = "cpu"
train.init_checkpoint = ""
train.max_iter = 4
train.output_dir = "output/lazy_shapes"
