"""What a wheel holds: the package, and the three top-level folders that live outside it."""

from setuptools import find_packages, setup

# configs/, model_cards/ and csrc/ stand at the top level, where a reader looks for them; a wheel
# carries them inside the package, where hybridzoo finds them once it is installed
MAPPED = {
    "configs": ["*.yaml", "train/*.yaml"],
    "model_cards": ["*.md", "*.png"],
    "csrc": ["**/*.cu", "**/*.cuh"],
}

setup(
    packages=[
        *find_packages(include=["hybridzoo", "hybridzoo.*"]),
        *(f"hybridzoo.{folder}" for folder in MAPPED),
    ],
    package_dir={f"hybridzoo.{folder}": folder for folder in MAPPED},
    package_data={
        "hybridzoo": ["py.typed"],
        "hybridzoo.zoo": ["weights/**/*"],
        **{f"hybridzoo.{folder}": patterns for folder, patterns in MAPPED.items()},
    },
)
