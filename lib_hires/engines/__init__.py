"""The standalone engine: diffusers loads a checkpoint's parts and its schedulers step, behind the denoiser seam.

    checkpoint.load(path) -> Components -> standalone.Engine(components).generate(Job(...)) -> Result

Nothing is imported here, so that `import lib_hires.engines` costs nothing and works without diffusers.
"""
