"""One step of training: loss, gradient, optimizer and moving average."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from .dit import VideoDiT
from .flow import FlowConfig, flow_loss
from .params import Params, split_params

#: What a step reports, by name.
Metrics = dict[str, Float[Array, ""]]

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant")
# Ends of the names of matrices: plain ones, and the two thin ones of an adapter.
_MATRICES = ("kernel", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run, beside the model's configuration.

    Attributes:
      steps: optimizer steps.
      batch_size: videos a step.
      optimizer: "adamw", or "muon" for the matrices of the blocks and AdamW for all else.
      learning_rate: peak learning rate, of both.
      schedule: of the learning rate: "cosine", down to zero after the last step, or "constant".
      warmup_steps: steps of the linear rise to it.
      weight_decay: of matrices; vectors, norms and modulation have none.
      clip_norm: global norm that gradients are clipped to.
      beta2: of Adam; 0.99 forgets the first, wild steps of a short run.
      ema_decay: of the moving average, once it is warm; 0 keeps none.
      seed: of the initial weights, the data, the times and the noise.
      save_every: steps between checkpoints.
      keep: checkpoints that are kept, the newest ones.
      flow: how times and noise are drawn.

    Raises:
      ValueError: a field is out of range.
    """

    steps: int = 1200
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta2: float = 0.99
    ema_decay: float = 0.99
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)

    def __post_init__(self) -> None:
        if isinstance(self.flow, dict):  # as it comes back from JSON
            object.__setattr__(self, "flow", FlowConfig(**self.flow))
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"expected an optimizer of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"expected a schedule of {SCHEDULES}, got {self.schedule!r}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), got {getattr(self, name)}")


class TrainState(NamedTuple):
    """What changes from step to step; `ema` is empty where no average is kept."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    optimizer: optax.OptState

    @property
    def averaged(self) -> Params:
        """What training is for: the moving average, or the parameters where none is kept."""
        return self.ema or self.params


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to zero at the last step, or no change."""
    warmup = min(config.warmup_steps, config.steps - 1)
    if config.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(
            0.0 if warmup else config.learning_rate, config.learning_rate, warmup
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate, config.learning_rate, warmup, config.steps
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, or Muon, behind a clip of the global gradient norm.

    Muon makes the update of a matrix orthogonal, so that all of its directions learn at one pace;
    `consistent_rms` gives those updates the size of AdamW's, and both then share a learning rate.
    """
    rate, decay = learning_rate(config), config.weight_decay

    def kernels(params: Params) -> dict[str, bool]:
        return {name: name.endswith(_MATRICES) for name in params}

    def block_kernels(params: Any) -> Any:
        return {
            name: optax.contrib.MuonDimensionNumbers() if kernel and "blocks." in name else None
            for name, kernel in kernels(params).items()
        }

    if config.optimizer == "muon":
        rule = optax.contrib.muon(
            rate,
            weight_decay=decay,
            weight_decay_mask=kernels,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=block_kernels,
            consistent_rms=0.2,
        )
    else:
        rule = optax.adamw(rate, b2=config.beta2, weight_decay=decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def init_state(params: Params, config: TrainConfig) -> TrainState:
    """Returns the state before the first step; the average starts at the parameters.

    What the optimizer keeps of a parameter lies where the parameter lies.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(params, config))
    return jax.jit(functools.partial(_first_state, config), out_shardings=places)(params)


def abstract_state(params: Mapping[str, Any], config: TrainConfig) -> TrainState:
    """The shapes of `init_state`'s state with their places; `params` may be shapes, too."""
    shapes = jax.eval_shape(functools.partial(_first_state, config), dict(params))
    places = {name: getattr(value, "sharding", None) for name, value in params.items()}
    meshes = [place.mesh for place in places.values() if isinstance(place, NamedSharding)]

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        name = str(getattr(path[-1], "key", ""))
        there = None if not meshes else NamedSharding(meshes[0], PartitionSpec())
        if meshes and name in params and leaf.shape == params[name].shape:
            there = places[name]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _first_state(config: TrainConfig, params: Params) -> TrainState:
    # a step donates the whole state, so it may share no buffer within itself or with the caller
    own, ema = (jax.tree.map(jnp.copy, params) for _ in range(2))
    ema = ema if config.ema_decay else {}
    return TrainState(jnp.int32(0), own, ema, optimizer(config).init(params))


def trained_alone(trained: Params) -> Params:
    """The parameters of a model all of whose parameters are trained."""
    return trained


def make_step(
    model: VideoDiT,
    config: TrainConfig,
    whole: Callable[..., Params] = trained_alone,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the compiled step of a model, `(state, batch, *inputs) -> (state, metrics)`.

    Args:
      model: what is trained.
      config: the run's settings.
      whole: `whole(trained, *inputs)` makes the model's parameters of those that are trained.
    """
    rebuild, _ = split_params(model)

    def loss_of(
        params: Params, key: Key[Array, ""], batch: dict[str, Array], *inputs: Any
    ) -> Float[Array, ""]:
        return flow_loss(
            rebuild(whole(params, *inputs)),
            batch["video"],
            batch["label"],
            batch["caption"] if model.config.caption_dim else None,
            key,
            null_label=model.config.classes,
            config=config.flow,
        )

    return make_update(jax.value_and_grad(loss_of), config)


def make_update(
    gradient_of: Callable[..., tuple[Float[Array, ""], Params]], config: TrainConfig
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the compiled step of any loss, `(state, *inputs) -> (state, metrics)`.

    The random key of a step comes from the seed and the step number alone, so the state needs no
    key of its own. Moving average: `ema = d ema + (1 - d) params` with
    `d = min(ema_decay, (1 + step) / (10 + step))`, which forgets the initial weights soon.

    Metrics: `loss`, `grad_norm` (before clipping) and `learning_rate`. The state is donated.

    Args:
      gradient_of: gives the loss and its gradient, such as `jax.value_and_grad(loss)`; called as
        `gradient_of(params, key, *inputs)`, inputs being trees of arrays.
      config: the run's settings.
    """
    rule, schedule = optimizer(config), learning_rate(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, *inputs: Any):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, gradient = gradient_of(state.params, key, *inputs)
        updates, rule_state = rule.update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = {name: decay * a + (1 - decay) * params[name] for name, a in state.ema.items()}
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        return TrainState(state.step + 1, params, ema, rule_state), metrics

    return step
