"""Public weights by open_clip's names: model and tag -> repository on the Hugging Face hub.

The table lists the models of open_clip 3.3.0 that this package reads exactly: Vision Transformers
(CLIP, OpenCLIP, DataComp, MetaCLIP 1 and 2, DFN, CLIPA), SigLIP 1 and 2, PE-Core and CoCa. Each
repository holds open_clip_config.json and the weights in open_clip's layout; the configuration
there, not the name, says which activation the weights were trained with. ResNets, ConvNeXt, EVA,
ViTamin, most of MobileCLIP and text towers of Hugging Face are missing because they are not read.

Two of open_clip's own entries are left out, because the repository holds other weights than the
name says: ViT-B-16-plus-240:laion400m_e32 (those of e31) and ViT-SO400M-14-SigLIP-378 (of 384 px).
"""

from __future__ import annotations

# Trained with QuickGELU. open_clip gives these tags to NAME and to NAME-quickgelu, and computes the
# plain NAME with the wrong activation after a warning; here both names load the same model.
QUICK_GELU: dict[str, dict[str, str]] = {
    "ViT-B-32": {
        "openai": "timm/vit_base_patch32_clip_224.openai",
        "laion400m_e31": "timm/vit_base_patch32_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_base_patch32_clip_224.laion400m_e32",
        "metaclip_400m": "timm/vit_base_patch32_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_base_patch32_clip_224.metaclip_2pt5b",
    },
    "ViT-B-16": {
        "openai": "timm/vit_base_patch16_clip_224.openai",
        "dfn2b": "apple/DFN2B-CLIP-ViT-B-16",
        "metaclip_400m": "timm/vit_base_patch16_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_base_patch16_clip_224.metaclip_2pt5b",
    },
    "ViT-L-14": {
        "openai": "timm/vit_large_patch14_clip_224.openai",
        "metaclip_400m": "timm/vit_large_patch14_clip_224.metaclip_400m",
        "metaclip_fullcc": "timm/vit_large_patch14_clip_224.metaclip_2pt5b",
        "dfn2b": "apple/DFN2B-CLIP-ViT-L-14",
    },
    "ViT-L-14-336": {"openai": "timm/vit_large_patch14_clip_336.openai"},
    "ViT-H-14": {
        "metaclip_fullcc": "timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
        "dfn5b": "apple/DFN5B-CLIP-ViT-H-14",
    },
    "ViT-H-14-378": {"dfn5b": "apple/DFN5B-CLIP-ViT-H-14-378"},
    "ViT-bigG-14": {"metaclip_fullcc": "timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b"},
    "ViT-H-14-worldwide": {
        "metaclip2_worldwide": "timm/vit_huge_patch14_clip_224.metaclip2_worldwide",
    },
}
GELU: dict[str, dict[str, str]] = {
    "ViT-B-32": {
        "laion2b_e16": "timm/vit_base_patch32_clip_224.laion2b_e16",
        "laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "datacomp_m_s128m_b4k": "laion/CLIP-ViT-B-32-DataComp.M-s128M-b4K",
        "commonpool_m_clip_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.clip-s128M-b4K",
        "commonpool_m_laion_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.laion-s128M-b4K",
        "commonpool_m_image_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.image-s128M-b4K",
        "commonpool_m_text_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.text-s128M-b4K",
        "commonpool_m_basic_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.basic-s128M-b4K",
        "commonpool_m_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M-s128M-b4K",
        "datacomp_s_s13m_b4k": "laion/CLIP-ViT-B-32-DataComp.S-s13M-b4K",
        "commonpool_s_clip_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.clip-s13M-b4K",
        "commonpool_s_laion_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.laion-s13M-b4K",
        "commonpool_s_image_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.image-s13M-b4K",
        "commonpool_s_text_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.text-s13M-b4K",
        "commonpool_s_basic_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.basic-s13M-b4K",
        "commonpool_s_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S-s13M-b4K",
    },
    "ViT-B-32-256": {"datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"},
    "ViT-B-16": {
        "laion400m_e31": "timm/vit_base_patch16_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_base_patch16_clip_224.laion400m_e32",
        "laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
        "datacomp_l_s1b_b8k": "laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K",
        "commonpool_l_clip_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.clip-s1B-b8K",
        "commonpool_l_laion_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.laion-s1B-b8K",
        "commonpool_l_image_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.image-s1B-b8K",
        "commonpool_l_text_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.text-s1B-b8K",
        "commonpool_l_basic_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.basic-s1B-b8K",
        "commonpool_l_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L-s1B-b8K",
    },
    "ViT-B-16-plus-240": {"laion400m_e31": "timm/vit_base_patch16_plus_clip_240.laion400m_e31"},
    "ViT-L-14": {
        "laion400m_e31": "timm/vit_large_patch14_clip_224.laion400m_e31",
        "laion400m_e32": "timm/vit_large_patch14_clip_224.laion400m_e32",
        "laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
        "commonpool_xl_clip_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.clip-s13B-b90K",
        "commonpool_xl_laion_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.laion-s13B-b90K",
        "commonpool_xl_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL-s13B-b90K",
        "dfn2b_s39b": "apple/DFN2B-CLIP-ViT-L-14-39B",
    },
    "ViT-H-14": {
        "laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "metaclip_altogether": "timm/vit_huge_patch14_clip_224.metaclip_altogether",
    },
    "ViT-g-14": {
        "laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        "laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    },
    "ViT-bigG-14": {"laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"},
    "coca_ViT-B-32": {
        "laion2b_s13b_b90k": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
        "mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k",  # noqa: E501
    },
    "coca_ViT-L-14": {
        "laion2b_s13b_b90k": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
        "mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",  # noqa: E501
    },
    "ViT-B-16-SigLIP": {"webli": "timm/ViT-B-16-SigLIP"},
    "ViT-B-16-SigLIP-256": {"webli": "timm/ViT-B-16-SigLIP-256"},
    "ViT-B-16-SigLIP-i18n-256": {"webli": "timm/ViT-B-16-SigLIP-i18n-256"},
    "ViT-B-16-SigLIP-384": {"webli": "timm/ViT-B-16-SigLIP-384"},
    "ViT-B-16-SigLIP-512": {"webli": "timm/ViT-B-16-SigLIP-512"},
    "ViT-L-16-SigLIP-256": {"webli": "timm/ViT-L-16-SigLIP-256"},
    "ViT-L-16-SigLIP-384": {"webli": "timm/ViT-L-16-SigLIP-384"},
    "ViT-SO400M-14-SigLIP": {"webli": "timm/ViT-SO400M-14-SigLIP"},
    "ViT-SO400M-14-SigLIP-384": {"webli": "timm/ViT-SO400M-14-SigLIP-384"},
    "ViT-B-32-SigLIP2-256": {"webli": "timm/ViT-B-32-SigLIP2-256"},
    "ViT-B-16-SigLIP2": {"webli": "timm/ViT-B-16-SigLIP2"},
    "ViT-B-16-SigLIP2-256": {"webli": "timm/ViT-B-16-SigLIP2-256"},
    "ViT-B-16-SigLIP2-384": {"webli": "timm/ViT-B-16-SigLIP2-384"},
    "ViT-B-16-SigLIP2-512": {"webli": "timm/ViT-B-16-SigLIP2-512"},
    "ViT-L-16-SigLIP2-256": {"webli": "timm/ViT-L-16-SigLIP2-256"},
    "ViT-L-16-SigLIP2-384": {"webli": "timm/ViT-L-16-SigLIP2-384"},
    "ViT-L-16-SigLIP2-512": {"webli": "timm/ViT-L-16-SigLIP2-512"},
    "ViT-SO400M-14-SigLIP2": {"webli": "timm/ViT-SO400M-14-SigLIP2"},
    "ViT-SO400M-14-SigLIP2-378": {"webli": "timm/ViT-SO400M-14-SigLIP2-378"},
    "ViT-SO400M-16-SigLIP2-256": {"webli": "timm/ViT-SO400M-16-SigLIP2-256"},
    "ViT-SO400M-16-SigLIP2-384": {"webli": "timm/ViT-SO400M-16-SigLIP2-384"},
    "ViT-SO400M-16-SigLIP2-512": {"webli": "timm/ViT-SO400M-16-SigLIP2-512"},
    "ViT-gopt-16-SigLIP2-256": {"webli": "timm/ViT-gopt-16-SigLIP2-256"},
    "ViT-gopt-16-SigLIP2-384": {"webli": "timm/ViT-gopt-16-SigLIP2-384"},
    "ViT-L-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B"},
    "ViT-L-14-CLIPA-336": {"datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B"},
    "ViT-H-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B"},
    "ViT-H-14-CLIPA-336": {
        "laion2b": "UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B",
        "datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B",
    },
    "ViT-bigG-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B"},
    "ViT-bigG-14-CLIPA-336": {"datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-336-datacomp1B"},
    "PE-Core-T-16-384": {"meta": "timm/PE-Core-T-16-384"},
    "PE-Core-S-16-384": {"meta": "timm/PE-Core-S-16-384"},
    "PE-Core-B-16": {"meta": "timm/PE-Core-B-16"},
    "PE-Core-L-14-336": {"meta": "timm/PE-Core-L-14-336"},
    "PE-Core-bigG-14-448": {"meta": "timm/PE-Core-bigG-14-448"},
    "ViT-H-14-worldwide-378": {
        "metaclip2_worldwide": "timm/vit_huge_patch14_clip_378.metaclip2_worldwide",
    },
    "ViT-bigG-14-worldwide": {
        "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_224.metaclip2_worldwide",
    },
    "ViT-bigG-14-worldwide-378": {
        "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_378.metaclip2_worldwide",
    },
}
# The captioners behind DFNDR-2B (Faghri et al. 2025), by what each was fine-tuned on and the text
# lengths that exist.
APPLE_COCA = "mobileclip2_coca_dfn2b_s13b"
_APPLE_FINE_TUNES = {
    "": (77,),
    "dci-complete_s12m": (77, 128, 256),
    "dci-extended_s12m": (77, 128, 256),
    "dci-short_s12m": (77, 128, 256),
    "docci_s12m": (77, 128, 256),
    "gbc10m-long": (256,),
    "gbc10m-short-relation": (256,),
    "gbc1m-long": (256,),
    "gbc1m-short": (77,),
    "mscoco38k_s12m": (77,),
    "recap-coco-30k_s12m": (77, 128, 256),
}


def _table() -> dict[tuple[str, str], str]:
    tables = [*QUICK_GELU.items(), *GELU.items()]
    tables += [(f"{model}-quickgelu", tags) for model, tags in QUICK_GELU.items()]
    found = {(model, tag): place for model, tags in tables for tag, place in tags.items()}
    for name, lengths in _APPLE_FINE_TUNES.items():
        for length in lengths:
            model = "coca_ViT-L-14" if length == 77 else f"coca_ViT-L-14-context{length}"
            tag = "_".join(part for part in (APPLE_COCA, name, f"context{length}") if part)
            found[model, tag] = f"apple/{tag}"
    return found


PRETRAINED = _table()  # (model, tag) -> repository
