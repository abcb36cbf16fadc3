"""The structures of the tables of LDM's blocks, written down by hand: SD1.x/SD2.x 12 + 1 + 12, SDXL 9 + 1 + 9."""

from lib_hires.plan.structure import CONV, DOWN, PAIR, DecoderStep, EncoderStep, Structure

SD1 = Structure(
    encoder=(
        EncoderStep(CONV, 0),
        EncoderStep(PAIR, 0, 1),
        EncoderStep(PAIR, 0, 1),
        EncoderStep(DOWN, 1),
        EncoderStep(PAIR, 1, 1),
        EncoderStep(PAIR, 1, 1),
        EncoderStep(DOWN, 2),
        EncoderStep(PAIR, 2, 1),
        EncoderStep(PAIR, 2, 1),
        EncoderStep(DOWN, 3),
        EncoderStep(PAIR, 3),
        EncoderStep(PAIR, 3),
    ),
    decoder=(
        DecoderStep(3),
        DecoderStep(3),
        DecoderStep(3, 0, True),
        DecoderStep(2, 1),
        DecoderStep(2, 1),
        DecoderStep(2, 1, True),
        DecoderStep(1, 1),
        DecoderStep(1, 1),
        DecoderStep(1, 1, True),
        DecoderStep(0, 1),
        DecoderStep(0, 1),
        DecoderStep(0, 1),
    ),
)


def sdxl(middle_depth=2, deep_depth=10, **widths):
    """SDXL with so many transformer blocks in a pair of its second and third level."""
    two, three = middle_depth, deep_depth
    return Structure(
        encoder=(
            EncoderStep(CONV, 0),
            EncoderStep(PAIR, 0),
            EncoderStep(PAIR, 0),
            EncoderStep(DOWN, 1),
            EncoderStep(PAIR, 1, two),
            EncoderStep(PAIR, 1, two),
            EncoderStep(DOWN, 2),
            EncoderStep(PAIR, 2, three),
            EncoderStep(PAIR, 2, three),
        ),
        decoder=(
            DecoderStep(2, three),
            DecoderStep(2, three),
            DecoderStep(2, three, True),
            DecoderStep(1, two),
            DecoderStep(1, two),
            DecoderStep(1, two, True),
            DecoderStep(0),
            DecoderStep(0),
            DecoderStep(0),
        ),
        **{"context_width": 2048, "vector_width": 2816, **widths},
    )


SDXL = sdxl()
REFINER = Structure(
    encoder=tuple(EncoderStep(s.kind, s.level, 4 if s.kind == PAIR and s.level in (1, 2) else 0) for s in SD1.encoder),
    decoder=tuple(DecoderStep(s.level, 4 if s.level in (1, 2) else 0, s.upsamples) for s in SD1.decoder),
    context_width=1280,
    vector_width=2560,
)
