"""RobustBench's CIFAR checkpoints by name: which architecture, and how their images are normalised.

A name is the file's place in RobustBench's model folder, "cifar10/Linf/Carmon2019Unlabeled". Files
of nets that normalise often lack the constants, and nothing in a file tells that they are missing:
the table does. Left out are ensembles and nets of other architectures.
"""

from collections.abc import Iterator

# Mean and standard deviation of the training images, with the digits of each published net.
CIFAR = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_NORMALISATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "cifar10": CIFAR[10],
    "cifar100": CIFAR[100],
    "short10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "exact10": (
        (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
        (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
    ),
    "other100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "exact100": (
        (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    ),
}
# An architecture of models/convert.py and a normalisation ("cifar" is that of the folder's own
# data); below them the folders and the files in each. Source: robustbench 1.1.1, its model zoo.
_TABLE = """
dm_preact_resnet_18_silu cifar
  cifar10/Linf Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_extra Rade2021Helper_R18_ddpm
    Gowal2021Improving_R18_ddpm_100m
  cifar10/L2 Rebuffi2021Fixing_R18_cutmix_ddpm Rade2021Helper_R18_ddpm
  cifar100/Linf Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_ddpm
dm_wide_resnet_106_16_silu cifar
  cifar10/Linf Rebuffi2021Fixing_106_16_cutmix_ddpm
dm_wide_resnet_28_10_silu cifar
  cifar10/Linf Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm
    Rade2021Helper_ddpm Gowal2021Improving_28_10_ddpm_100m Pang2022Robustness_WRN28_10
    Wang2023Better_WRN-28-10 Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10
  cifar10/L2 Rebuffi2021Fixing_28_10_cutmix_ddpm Wang2023Better_WRN-28-10
  cifar100/Linf Rebuffi2021Fixing_28_10_cutmix_ddpm Pang2022Robustness_WRN28_10
    Wang2023Better_WRN-28-10 Cui2023Decoupled_WRN-28-10
dm_wide_resnet_34_10_silu cifar
  cifar10/Linf Rade2021Helper_extra
dm_wide_resnet_34_20_silu cifar
  cifar10/Linf Gowal2020Uncovering_34_20
dm_wide_resnet_70_16_silu cifar
  cifar10/Linf Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra
    Rebuffi2021Fixing_70_16_cutmix_ddpm Rebuffi2021Fixing_70_16_cutmix_extra
    Gowal2021Improving_70_16_ddpm_100m Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16
  cifar10/L2 Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm
    Rebuffi2021Fixing_70_16_cutmix_extra Wang2023Better_WRN-70-16
  cifar10/corruptions Rebuffi2021Fixing_70_16_cutmix_extra_Linf
    Rebuffi2021Fixing_70_16_cutmix_extra_L2
  cifar100/Linf Gowal2020Uncovering Gowal2020Uncovering_extra
    Rebuffi2021Fixing_70_16_cutmix_ddpm Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16
  cifar100/corruptions Gowal2020Uncovering_Linf Gowal2020Uncovering_extra_Linf
dm_wide_resnet_82_8_silu cifar
  cifar10/Linf Bartoldson2024Adversarial_WRN-82-8
dm_wide_resnet_94_16_silu cifar
  cifar10/Linf Bartoldson2024Adversarial_WRN-94-16
preact_resnet_18 cifar
  cifar10/Linf Wong2020Fast
preact_resnet_18 none
  cifar10/Linf Andriushchenko2020Understanding
preact_resnet_18_v2 cifar
  cifar10/L2 Rice2020Overfitting
  cifar10/corruptions Kireev2021Effectiveness_Gauss50percent Kireev2021Effectiveness_AugMixNoJSD
    Kireev2021Effectiveness_RLAT Kireev2021Effectiveness_RLATAugMixNoJSD
    Kireev2021Effectiveness_RLATAugMix
preact_resnet_18_v2 exact100
  cifar100/Linf Rice2020Overfitting
preact_resnet_18_v2 none
  cifar100/Linf Addepalli2021Towards_PARN18
  cifar100/corruptions Addepalli2021Towards_PARN18
wide_resnet_28_10 half
  cifar10/Linf Hendrycks2019Using
  cifar100/Linf Hendrycks2019Using
wide_resnet_28_10 none
  cifar10/Linf Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving Wu2020Adversarial_extra
    Zhang2020Geometry Sridhar2021Robust Standard
  cifar10/L2 Standard
  cifar10/corruptions Standard
wide_resnet_28_10 short10
  cifar10/L2 Rony2019Decoupling
wide_resnet_34_10 cifar
  cifar10/Linf Chen2020Efficient
wide_resnet_34_10 exact10
  cifar10/L2 Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra
wide_resnet_34_10 exact100
  cifar100/Linf Wu2020Adversarial
wide_resnet_34_10 none
  cifar10/Linf Zhang2019Theoretically Huang2020Self Zhang2019You Zhang2020Attacks
    Wu2020Adversarial Sehwag2021Proxy Sitawarin2020Improving Cui2020Learnable_34_10
    Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 Jia2022LAS-AT_34_10
    Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 Chen2024Data_WRN_34_10
  cifar10/L2 Wu2020Adversarial Sehwag2021Proxy
  cifar10/corruptions Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10
  cifar100/Linf Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 Sehwag2021Proxy
    Sitawarin2020Improving Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 Jia2022LAS-AT_34_10
    Addepalli2022Efficient_WRN_34_10 Cui2020Learnable_34_10_LBGAT9_eps_8_255
    Cui2023Decoupled_WRN-34-10 Cui2023Decoupled_WRN-34-10_autoaug Chen2024Data_WRN_34_10
  cifar100/corruptions Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10
wide_resnet_34_10 other100
  cifar100/Linf Chen2020Efficient
wide_resnet_34_15 none
  cifar10/Linf Sridhar2021Robust_34_15
wide_resnet_34_20 cifar
  cifar10/Linf Rice2020Overfitting
wide_resnet_34_20 none
  cifar10/Linf Cui2020Learnable_34_20 Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20
  cifar100/Linf Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20
wide_resnet_40_2 half
  cifar10/corruptions Hendrycks2020AugMix_WRN
  cifar100/corruptions Hendrycks2020AugMix_WRN
wide_resnet_70_16 none
  cifar10/Linf Jia2022LAS-AT_70_16
"""


def published(name: str) -> tuple[str, dict[str, tuple[float, ...]]]:
    """The architecture and the normalisation of one of RobustBench's CIFAR checkpoints.

    Args:
        name: "cifar10/Linf/Carmon2019Unlabeled": data, threat ("Linf", "L2" or "corruptions") and
            RobustBench's name of the model.

    Returns:
        A name of `convert.ARCHITECTURES`, and {"mean": ..., "std": ...}.

    Raises:
        ValueError: the table has no such checkpoint; names that contain the last part are listed.
    """
    table = dict(checkpoints())
    if name not in table:
        near = sorted(n for n in table if name.rsplit("/", 1)[-1].lower() in n.lower())
        raise ValueError(
            f"name must be data/threat/model of a known checkpoint, got {name!r}; "
            f"alike: {', '.join(near[:8]) or 'none'}"
        )
    architecture, kind = table[name]
    mean, std = _NORMALISATIONS[name.split("/")[0] if kind == "cifar" else kind]
    return architecture, {"mean": mean, "std": std}


def checkpoints() -> Iterator[tuple[str, tuple[str, str]]]:
    """Every (name, (architecture, normalisation)) of the table."""
    for line in _TABLE.strip().splitlines():
        words = line.split()
        if not line.startswith(" "):
            architecture, normalisation = words
            continue
        if "/" in words[0]:
            folder = words.pop(0)
        yield from ((f"{folder}/{word}", (architecture, normalisation)) for word in words)
