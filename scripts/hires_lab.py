"""Hires Lab in a WebUI: the AlwaysOn script. Everything it does is in lib_hires/webui and lib_hires/hosts."""

import sys
from functools import partial
from pathlib import Path

from modules import script_callbacks, scripts

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from lib_hires.hosts.protocol import OVERRIDE, find_host  # noqa: E402
from lib_hires.webui.accordion import TITLE, build_panel  # noqa: E402
from lib_hires.webui.arguments import read_arguments  # noqa: E402
from lib_hires.webui.xyz import add_axes  # noqa: E402

HOST = find_host()


class HiresLab(scripts.Script):
    """Glue: each of the host's moments goes to the host adapter."""

    def title(self):
        return TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        panel = build_panel(self.elem_id)
        self.infotext_fields, self.paste_field_names = panel.infotext_fields, panel.paste_field_names
        return panel.components

    def process(self, p, *args):
        HOST.prepare(p, partial(read_arguments, args))

    def process_before_every_sampling(self, p, *args, **kwargs):
        HOST.before_sampling(p, kwargs["x"])

    def post_sample(self, p, *args):
        HOST.after_sampling(p)

    def postprocess_batch(self, p, *args, **kwargs):
        HOST.after_decoding(p)


HOST.register()
add_axes(OVERRIDE)  # a host without a page never gets to on_before_ui
script_callbacks.on_before_ui(partial(add_axes, OVERRIDE))
