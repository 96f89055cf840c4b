"""Pairs of one file, as a recipe with this one source reads them."""

from __future__ import annotations

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.recipe_files import read_sources
from pipeline.data.sources import read_source, require_known_objectives


def source_of(path, data_format="pairs", of_recipe=("helpfulness", "honesty"), max_left_out=1.0, **settings):
    config = SourceConfig(path=str(path), format=data_format, **settings)
    return read_source(config, str(path), of_recipe, seed=0, max_left_out=max_left_out)


def read_mixture(paths):
    """One source a path."""
    sources = tuple(SourceConfig(name=f"s{i}", path=str(path)) for i, path in enumerate(paths))
    return read_sources(
        ExperimentConfig(name="mixture", objectives=("helpfulness", "honesty"), data=DataConfig(sources=sources))
    )


def read_pairs(path, data_format, objectives, max_left_out=1.0):
    source = source_of(path, data_format, objectives, max_left_out)
    require_known_objectives([source], objectives)
    return source.pairs
