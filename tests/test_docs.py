"""The documentation names every setting and every loss, and its links lead somewhere."""

import re

import pytest
from conftest import ROOT
from detectron2.config import CfgNode, get_cfg
from ssimkd import KD_LOSS_REGISTRY, add_ssimkd_config
from ssimkd_cli import COMMANDS

PAGES = [ROOT / name for name in ("README.md", "configs/README.md", "projects/SSIMKD/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LOSSES = [name for name, _ in KD_LOSS_REGISTRY]


def distill():
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    return cfg.MODEL.DISTILL


def test_every_setting_is_in_the_page_of_settings():
    page = (ROOT / "docs/configuration.md").read_text()
    for key, value in distill().items():
        if key.lower() in LOSSES:
            continue
        for name in [f"TEACHER.{x}" for x in value] if isinstance(value, CfgNode) else [key]:
            assert re.search(rf"^\|`(MODEL\.DISTILL\.)?{re.escape(name)}`\|", page, re.M), name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_option_of_a_loss_is_in_the_page_of_losses(loss):
    page = (ROOT / "docs/losses.md").read_text()
    (section,) = re.findall(rf"^## [^\n]*`{loss}`.*?(?=^## )", page, re.M | re.S)
    if loss == "ms_ssim":  # says that its options are those of SSIM
        section += page
    for option in distill()[loss.upper()]:
        assert f"`{option}" in section, f"{loss}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", text):
        assert not link or (page.parent / link).exists(), link
    for command in re.findall(r"(?:^|[`$] ?| {4})ssimkd ([a-z]+)", text, re.M):
        assert command in COMMANDS, command
