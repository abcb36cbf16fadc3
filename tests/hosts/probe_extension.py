"""A test-only extension: tells over HTTP what hooks and overrides are on the UNet, and what each session ran.

Copied into the data folder of the host under test; never installed otherwise.
"""

from modules import script_callbacks, shared

from lib_hires.canvas.canvas import Canvas
from lib_hires.unet.session import Session

RAN = []
_close = Session.close


def close(session):
    """Remember what a session ran, when it is closed."""
    if session.is_open:
        RAN.append({"ran": dict(session.ran), "notes": list(session.notes), "seeds": list(session.seeds)})
    _close(session)


Session.close = close
_predict = Canvas.predict


def fail(body: dict):
    """Make a coming canvas' network call number `call` fail."""
    calls = []

    def predict(canvas, x, moment, images, evaluate, guide=None):
        def failing(*inputs):
            calls.append(1)
            if len(calls) == body["call"]:
                Canvas.predict = _predict
                raise RuntimeError("a view failed on purpose")
            return evaluate(*inputs)

        return _predict(canvas, x, moment, images, failing, guide)

    Canvas.predict = predict
    return {}


def look():
    """Hooks and instance overrides on the UNet, callbacks of ours, and the sessions since the last look."""
    unet = shared.sd_model.model.diffusion_model
    hooks, overrides = 0, []
    for name, module in unet.named_modules():
        hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
        slots = vars(module).items()  # Hypertile leaves its own `forward` on attentions for ever
        overrides += [f"{name}.{key}" for key, value in slots if key == "_conv_forward" or hasattr(value, "hires_lab")]
    model = shared.sd_model
    for owner in (model, model.first_stage_model.decoder):
        overrides += [key for key in ("apply_model", "forward") if key in vars(owner)]
    callbacks = [c.name for c in script_callbacks.callback_map["callbacks_cfg_denoiser"] if "hires" in c.name]
    sessions, RAN[:] = list(RAN), []
    return {"hooks": hooks, "overrides": overrides, "callbacks": callbacks, "sessions": sessions}


def add_route(_demo, app):
    """The probe's address."""
    app.add_api_route("/hires-lab-probe", look, methods=["GET"])
    app.add_api_route("/hires-lab-probe/fail", fail, methods=["POST"])


script_callbacks.on_app_started(add_route)
