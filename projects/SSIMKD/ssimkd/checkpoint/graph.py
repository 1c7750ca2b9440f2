"""A detector as a graph that runs without Detectron2: TorchScript or ONNX.

    image    (3, H, W) uint8     as the config's mapper gives it: resized, in its channel order
    outputs  one tensor of n rows per field of Detectron2's Instances, such as pred_boxes (n, 4):
             x0, y0, x1, y1 in pixels of this image

It is made by tracing one image; H and W may vary afterwards. torch.export does not work: Detectron2
pads images by sizes that it computes in tensors, which its guards do not follow.
"""

import os
import warnings
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple
from unittest import mock

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from ssimkd.errors import ConfigError, as_config_error, building

SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx"}  # of the formats
# Masks, boxes and scores of graph and detector may differ by this; boxes are in pixels.
RTOL, ATOL = 1e-4, 1e-3
Outputs = Tuple[Tensor, ...]


class OneImage(nn.Module):
    """A detector of one image, without Detectron2's containers around its tensors.

    Args:
        model (nn.Module): in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Outputs:
        """(3, H, W) -> the fields of :meth:`detect`, in its order."""
        return tuple(self.detect(image).values())

    def detect(self, image: Tensor) -> Dict[str, Tensor]:
        """Name -> tensor of n rows."""
        if isinstance(self.model, GeneralizedRCNN) and not segments(self.model):
            # masks stay as their heads give them
            found = self.model.inference([{"image": image}], do_postprocess=False)[0]
        else:
            found = self.model([{"image": image}])[0]["instances"]
        return {name: getattr(v, "tensor", v) for name, v in found.get_fields().items()}


def segments(model: Any) -> bool:
    """Whether a detector gives more than instances."""
    return hasattr(model, "sem_seg_head")


@contextmanager
def traceable() -> Iterator[None]:
    """While it is traced, `len` of detections stays a tensor, or their number becomes a constant.

    Detectron2's own `patch_builtin_len` does so; in v0.5 it cannot be imported without caffe2.
    """
    with ExitStack() as stack:
        for part in ("fast_rcnn", "mask_head", "keypoint_head"):
            where = f"detectron2.modeling.roi_heads.{part}.len"
            stack.enter_context(mock.patch(where, lambda x: x.__len__(), create=True))
        yield


@torch.no_grad()
def write_graph(model: nn.Module, images: Sequence[Tensor], kind: str, folder: str) -> str:
    """Writes `student.ts` or `student.onnx`, if it finds in the images what the detector finds.

    Args:
        model (nn.Module): in evaluation mode, on the CPU.
        images (sequence[Tensor]): (3, H, W) uint8; the first is traced, all are compared.
        kind (str): a key of SUFFIXES.
        folder (str): of the file; one that is there already stays unless the new one is right.

    Returns:
        str: the file.

    Raises:
        ConfigError: the detector cannot be traced, the graph does not agree with it, or a package
            is missing.
    """
    if segments(model):
        raise ConfigError(f"--format: a {type(model).__name__} gives more than instances")
    detector = OneImage(model)
    expected = [detector.detect(image) for image in images]
    path = os.path.join(folder, f"student{SUFFIXES[kind]}")
    os.makedirs(folder, exist_ok=True)
    write, read = WAYS[kind]
    try:
        failure = f"--format {kind}: this {type(model).__name__} cannot be traced"
        with building(failure), traceable(), warnings.catch_warnings():
            # of values that became constants: whether it matters is compared below
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            write(detector, images[0], list(expected[0]), path + ".tmp")
        compare(read(path + ".tmp"), images, expected, kind)
        os.replace(path + ".tmp", path)
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
    return path


def compare(
    graph: Callable[[Tensor], Outputs],
    images: Sequence[Tensor],
    expected: List[Dict[str, Tensor]],
    kind: str,
) -> None:
    """Raises ConfigError unless a graph finds in every image what the detector finds."""
    if not any(len(tensor) for found in expected for tensor in found.values()):
        raise ConfigError("--images: nothing is found in them: there is nothing to compare")
    failure = (
        f"--format {kind}: nothing is written, since the graph does not agree with the detector"
    )
    for number, (image, fields) in enumerate(zip(images, expected), start=1):
        # a graph that is wrong may fail anywhere
        with as_config_error(f"{failure} on image {number}", Exception):
            outputs = graph(image)
            for (name, tensor), output in zip(fields.items(), outputs):
                torch.testing.assert_close(output, tensor, rtol=RTOL, atol=ATOL, msg=name)


def write_script(detector: OneImage, image: Tensor, names: List[str], path: str) -> None:
    """Writes TorchScript, which needs torchvision's operators to run: import torchvision."""
    torch.jit.save(torch.jit.trace(detector, (image,), check_trace=False), path)


def read_script(path: str) -> Callable[[Tensor], Outputs]:
    """A written graph as a function."""
    return torch.jit.load(path)


def write_onnx(detector: OneImage, image: Tensor, names: List[str], path: str) -> None:
    """Writes ONNX of opset 17, with the fields' names for the outputs.

    torch's older exporter: the newer one is built on torch.export.
    """
    for package in ("onnx", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(f"--format onnx: pip install {package}, which it needs") from error
    torch.onnx.export(
        detector,
        (image,),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=names,
        dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "n"} for name in names}},
    )


def read_onnx(path: str) -> Callable[[Tensor], Outputs]:
    """A written graph as a function."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: tuple(map(torch.as_tensor, session.run(None, {"image": x.numpy()})))


WAYS = {"torchscript": (write_script, read_script), "onnx": (write_onnx, read_onnx)}
