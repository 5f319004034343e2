"""One device, 4 x 2 and 2 x 2 x 2: the same training."""

from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import load_params, steps
from m6rec_jax.artifacts.content import content, digests
from m6rec_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.domains import joint_pools, joint_records, joint_shares, joint_vocab, open_domains
from m6rec_jax.data.loader import PlanRows, batches
from m6rec_jax.data.plan import Plan
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.training.checkpoint import CheckpointWriter, Position, restore
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import make_mesh, place_batch, place_items
from m6rec_jax.training.state import abstract_state, init_state
from m6rec_jax.training.step import make_train_step
from tests.domains import films  # noqa: F401
from tests.fixtures import tiny_dataset, tiny_levels, tiny_root  # noqa: F401

STEPS = 20
CONFIG = Config(
    model=ModelConfig(layers=2, width=32, heads=4, kv_heads=2),
    optim=OptimConfig(learning_rate=1e-3, warmup=4),
    data=DataConfig(length=64, rows=8, block=512),
    checkpoint=CheckpointConfig(every=5),
    train=TrainConfig(steps=STEPS, eval_every=0),
)
MESHES = {"4x2": MeshConfig(4, 2, 1), "2x2x2": MeshConfig(2, 2, 2)}


class World:
    """Everything of a run but the mesh."""

    def __init__(self, *paths):
        domains = open_domains(paths)
        self.pools = joint_pools(domains, CONFIG.mixture, "train", CONFIG.data)
        plan = Plan(self.pools, joint_shares(domains, CONFIG.mixture, self.pools), CONFIG.data, 0)
        rows = PlanRows(plan, joint_records(domains, "train"), 0, STEPS, CONFIG.data.rows, 0, 1)
        self.batches = list(islice(batches(rows, 1), STEPS))
        width, *more = (domain.dataset.content.shape[1] for domain in domains)
        self.blueprint = Blueprint(CONFIG.model, joint_vocab(domains), width, tuple(more))
        self.items = tuple(item_table(domain.dataset.content, domain.dataset.seen) for domain in domains)
        self.optimizer = make_optimizer(CONFIG.optim, STEPS)

    def losses(self, mesh, negatives=0):
        """The loss of each of 20 steps, dropout on."""
        step = make_train_step(self.blueprint, self.optimizer, len(self.pools), 0, 0.1, negatives)
        items, found = place_items(mesh, self.items), []
        with jax.set_mesh(mesh):
            state = init_state(self.blueprint, self.optimizer, 0)
            for batch in self.batches:
                state, measured = step(state, place_batch(mesh, batch, 1), items)
                found.append(float(measured.losses.loss.sum() / measured.losses.weight.sum()))
        return np.array(found), state


@pytest.fixture(scope="module", params=[["tiny_dataset"], ["tiny_levels"], ["tiny_dataset", "films"]], ids="+".join)
def world(request):
    return World(*map(request.getfixturevalue, request.param))


@pytest.fixture(scope="module")
def alone(world):
    return world.losses(make_mesh(MeshConfig(1, 1, 1), devices=1))[0]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_equal_those_of_one_device(world, alone, mesh):
    together, state = world.losses(make_mesh(mesh))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert np.ptp(together) > 0.01  # there is something to agree on
    held = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    assert any("fsdp" in str(spec) for spec in held)
    assert any("tensor" in str(spec) for spec in held) or mesh.tensor == 1


def test_a_sampled_softmax_draws_the_same_on_every_mesh(world):
    one = world.losses(make_mesh(MeshConfig(1, 1, 1), devices=1), negatives=16)[0]
    np.testing.assert_allclose(world.losses(make_mesh(MESHES["2x2x2"]), negatives=16)[0], one, rtol=1e-5)


def test_moments_are_sharded_like_their_parameters(world):
    with jax.set_mesh(make_mesh(MESHES["2x2x2"])):
        state = init_state(world.blueprint, world.optimizer, 0)
    by_shape = {}
    for leaf in jax.tree.leaves(state.params):
        by_shape.setdefault(leaf.shape, set()).add(leaf.sharding.spec)
    for leaf in jax.tree.leaves(state.optimizer):
        if leaf.ndim:
            assert leaf.sharding.spec in by_shape[leaf.shape], leaf.shape


def test_a_checkpoint_moves_between_meshes_to_the_bit(world, tmp_path):
    with jax.set_mesh(make_mesh(MESHES["2x2x2"])):
        state = init_state(world.blueprint, world.optimizer, 3)
        writer = CheckpointWriter(tmp_path, CONFIG.checkpoint)
        writer.save(state, Position(40, 2, 33), {})
        writer.wait()
    with jax.set_mesh(make_mesh(MESHES["4x2"])):
        abstract = abstract_state(init_state(world.blueprint, world.optimizer, 0))
        moved, position = restore(tmp_path, abstract)
    assert position == Position(40, 2, 33)
    for a, b, like in zip(*(jax.tree.leaves(t) for t in (state, moved, abstract)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert b.sharding == like.sharding
    here = digests(content(jax.tree.map(np.asarray, state)))  # on one device
    assert digests(content(state)) == digests(content(moved)) == here


def test_train_resumes_on_another_mesh_and_the_run_is_read_by_one_device(tiny_dataset, tmp_path):  # noqa: F811
    """20 steps on 4x2, against 10 on 2x2x2 and the rest on 4x2: the same parameters within rounding."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(replace(CONFIG, mesh=MESHES["4x2"]), [tiny_dataset], straight)
    # Patience ends the first part at step 10, in the middle of a schedule of 20 steps.
    impatient = replace(CONFIG, mesh=MESHES["2x2x2"], train=replace(CONFIG.train, patience=1, eval_every=5))
    scores = iter((0.2, 0.1))
    train(impatient, [tiny_dataset], moved, make_evaluator=lambda *_: lambda params: {"ndcg@10": next(scores)})
    assert steps(moved)[-1] == 10
    train(replace(CONFIG, mesh=MESHES["4x2"]), [tiny_dataset], moved)
    dataset = open_dataset(tiny_dataset)
    shapes = Blueprint(CONFIG.model, dataset.vocab, dataset.content.shape[1]).shapes()
    (a, left), (b, right) = (load_params(run, "latest", shapes) for run in (straight, moved))
    assert (a, b) == (STEPS, STEPS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), left, right)


def test_rows_that_do_not_divide_are_refused_before_compiling(tiny_dataset, tmp_path):  # noqa: F811
    config = replace(CONFIG, data=replace(CONFIG.data, rows=12))
    with pytest.raises(InputError, match="data.rows=12 does not divide over 8 row shards.*multiple of 8"):
        train(config, [tiny_dataset], tmp_path / "run")
    config = replace(CONFIG, mesh=MeshConfig(2, 1, 4))
    with pytest.raises(InputError, match="mesh.tensor=4 does not divide the 2 kv heads"):
        train(config, [tiny_dataset], tmp_path / "run")
    config = replace(CONFIG, mesh=MeshConfig(1, 8, 1), model=replace(CONFIG.model, width=36, heads=2))
    with pytest.raises(InputError, match="mesh.fsdp=8 does not divide the 36 model.width"):
        train(config, [tiny_dataset], tmp_path / "run")
    with pytest.raises(InputError, match="mesh data=16 .* there are 8"):
        train(replace(CONFIG, mesh=MeshConfig(16, 1, 1)), [tiny_dataset], tmp_path / "run")
    assert not (tmp_path / "run").exists()
