from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import randn, relative_error
from torch import Tensor

from consistory.attention import AttentionControl, Site
from consistory.injection import Injection
from consistory.sdsa import Consistent, RecordQueries, Sharing, align_keys

IMAGES, ANCHORS, HEADS, WIDTH = 4, 2, 2, 16
PATCHES = {2: 24, 4: 6}  # by stride
TOKENS, CONCEPTS = 7, 3
FINE, COARSE = Site("decoder", 6, 2), Site("decoder", 0, 4)
OTHERS = [Site("encoder", 0, 2), Site("encoder", 2, 4), Site("mid", 0, 4)]
TOLERANCE = 1e-6


def self_inputs(stride: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [2 N, H, P, d]; queries are large enough that attention is far from even."""
    shape = (2 * IMAGES, HEADS, PATCHES[stride], WIDTH)
    return 3 * randn(*shape, seed=seed), randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2)


def cross_inputs(stride: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (2 * IMAGES, HEADS, TOKENS, WIDTH)
    return 3 * randn(2 * IMAGES, HEADS, PATCHES[stride], WIDTH), randn(*shape, seed=1), randn(*shape, seed=2)


def key_masks() -> dict[int, Tensor]:
    return {stride: randn(ANCHORS, patches, seed=stride) > 0 for stride, patches in PATCHES.items()}


def sharing(vanilla: tuple[RecordQueries, float] | None = None) -> Sharing:
    share = ~torch.eye(IMAGES, ANCHORS, dtype=torch.bool)
    return Sharing(key_masks(), share, vanilla)


def token_weights(concepts: int = CONCEPTS) -> Tensor:
    return randn(IMAGES, TOKENS, concepts, seed=9).softmax(dim=1)


def consistent(shared: Sharing | None = None, injection: Injection | None = None) -> Consistent:
    return Consistent(token_weights(), map_stride=4, sharing=shared, injection=injection, injection_stride=2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / WIDTH**0.5).softmax(dim=-1) @ v


def literal(q: Tensor, k: Tensor, v: Tensor, masks: Tensor) -> Tensor:
    """Eqs. 2-3, image by image: its own keys, then the kept keys of every other anchor of its half."""
    out = torch.empty_like(q)
    for half in range(2):
        for i in range(IMAGES):
            row = half * IMAGES + i
            keys, values = [k[row]], [v[row]]
            for j in range(ANCHORS):
                if j != i:
                    keys.append(k[half * IMAGES + j][:, masks[j]])
                    values.append(v[half * IMAGES + j][:, masks[j]])
            out[row] = attend(q[row], torch.cat(keys, dim=1), torch.cat(values, dim=1))
    return out


# --- shared self-attention (eqs. 2-3) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [FINE, COARSE], ids=["fine", "coarse"])
def test_decoder_reads_own_and_kept_anchor_patches(site: Site) -> None:
    q, k, v = self_inputs(site.stride)
    out = consistent(sharing()).self_attention(q, k, v, site)
    assert relative_error(out, literal(q, k, v, key_masks()[site.stride])) <= TOLERANCE
    assert relative_error(out, attend(q, k, v)) > 0.1


@pytest.mark.parametrize("site", OTHERS, ids=lambda site: f"{site.part}-{site.stride}")
def test_encoder_and_middle_are_plain(site: Site) -> None:
    q, k, v = self_inputs(site.stride)
    plain = AttentionControl().self_attention(q, k, v, site)
    recorder = RecordQueries()
    recorder.self_attention(*self_inputs(site.stride, seed=5), site)
    assert torch.equal(consistent(sharing((recorder, 0.9))).self_attention(q, k, v, site), plain)


def test_without_sharing_the_decoder_is_plain() -> None:
    q, k, v = self_inputs(2)
    plain = AttentionControl().self_attention(q, k, v, FINE)
    assert torch.equal(consistent().self_attention(q, k, v, FINE), plain)


def changed_images(k: Tensor, v: Tensor, row: int, patches: Tensor | slice) -> list[int]:
    """Which of the 2 N outputs change when keys and values of one sample's patches do."""
    q, control = self_inputs(2)[0], consistent(sharing())
    before = control.self_attention(q, k, v, FINE)
    k, v = k.clone(), v.clone()
    k[row][:, patches] += 1
    v[row][:, patches] -= 1
    after = control.self_attention(q, k, v, FINE)
    return [i for i in range(2 * IMAGES) if not torch.equal(before[i], after[i])]


@pytest.mark.parametrize("half", [0, 1], ids=["unconditional", "conditional"])
def test_who_depends_on_whom(half: int) -> None:
    """Halves never mix; all read the anchors' kept patches; nobody reads an extra's, or a patch that is not kept."""
    _, k, v = self_inputs(2)
    everyone = [half * IMAGES + i for i in range(IMAGES)]
    for anchor in range(ANCHORS):
        kept = key_masks()[2][anchor]
        row = half * IMAGES + anchor
        assert changed_images(k, v, row, kept) == everyone
        assert changed_images(k, v, row, ~kept) == [row]
    for extra in range(ANCHORS, IMAGES):
        assert changed_images(k, v, half * IMAGES + extra, slice(None)) == [half * IMAGES + extra]


def test_share_says_who_reads_which_anchor() -> None:
    q, k, v = self_inputs(2)
    share = torch.zeros(IMAGES, ANCHORS, dtype=torch.bool)
    share[3, 0] = True
    out = consistent(Sharing(key_masks(), share, None)).self_attention(q, k, v, FINE)
    plain, kept = attend(q, k, v), key_masks()[2][0]
    for half in range(2):
        rows = half * IMAGES + torch.arange(3)
        assert relative_error(out[rows], plain[rows]) <= TOLERANCE
        anchor, reader = half * IMAGES, half * IMAGES + 3
        keys = torch.cat([k[reader], k[anchor][:, kept]], dim=1)
        values = torch.cat([v[reader], v[anchor][:, kept]], dim=1)
        assert relative_error(out[reader], attend(q[reader], keys, values)) <= TOLERANCE


def test_regions_say_which_kept_patches_a_query_reads() -> None:
    """Two regions side by side; the last queries are in neither and have both bits."""
    q, k, v = self_inputs(2)
    first, second, rest = slice(0, 10), slice(10, 18), slice(18, 24)
    region = torch.tensor([1] * 10 + [2] * 8 + [3] * 6, dtype=torch.int32).expand(IMAGES, -1)
    shared = sharing()
    shared = replace(shared, regions={2: (region, region[:ANCHORS]), 4: (region[:, :6], region[:ANCHORS, :6])})
    out = consistent(shared).self_attention(q, k, v, FINE)
    masks = key_masks()[2]
    for queries, keys in ((first, [first, rest]), (second, [second, rest]), (rest, [slice(None)])):
        readable = torch.zeros_like(masks)
        for part in keys:
            readable[:, part] = masks[:, part]
        assert relative_error(out[:, :, queries], literal(q, k, v, readable)[:, :, queries]) <= TOLERANCE


# --- vanilla queries (eq. 4) ------------------------------------------------------------------------------------------


def test_recording_is_plain_and_keeps_the_decoders_queries() -> None:
    recorder = RecordQueries()
    for site in [FINE, COARSE, *OTHERS]:
        q, k, v = self_inputs(site.stride)
        assert torch.equal(recorder.self_attention(q, k, v, site), AttentionControl().self_attention(q, k, v, site))
    assert recorder.queries.keys() == {FINE, COARSE}
    assert torch.equal(recorder.queries[FINE], self_inputs(2)[0])


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
def test_queries_are_blended_with_those_of_the_same_site(weight: float) -> None:
    recorder = RecordQueries()
    vanilla = {site: self_inputs(site.stride, seed=10 + site.index) for site in (FINE, COARSE)}
    for site, tensors in vanilla.items():
        recorder.self_attention(*tensors, site)
    for site in (FINE, COARSE):
        q, k, v = self_inputs(site.stride)
        out = consistent(sharing((recorder, weight))).self_attention(q, k, v, site)
        blended = (1 - weight) * q + weight * vanilla[site][0]
        assert relative_error(out, literal(blended, k, v, key_masks()[site.stride])) <= TOLERANCE


# --- cross-attention maps (eq. 7) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [COARSE, *OTHERS[1:]], ids=lambda site: site.part)
def test_maps_are_the_conditional_halfs_probabilities(site: Site) -> None:
    """Mean of the heads; a concept's tokens weighted, never the unconditional half."""
    q, k, v = cross_inputs(4)
    control = consistent()
    out = control.cross_attention(q, k, v, site)
    assert relative_error(out, attend(q, k, v)) <= TOLERANCE
    probabilities = (q @ k.mT / WIDTH**0.5).softmax(dim=-1)[IMAGES:]
    expected = torch.einsum("nhpt,ntk->npk", probabilities, token_weights()) / HEADS
    (cross_map,) = control.cross_maps
    assert cross_map.shape == (IMAGES, PATCHES[4], CONCEPTS)
    assert relative_error(cross_map, expected) <= TOLERANCE


def test_the_map_of_a_single_token_is_its_column() -> None:
    q, k, v = cross_inputs(4)
    weights = torch.zeros(IMAGES, TOKENS, 1)
    weights[:, 2] = 1
    control = Consistent(weights, map_stride=4)
    control.cross_attention(q, k, v, COARSE)
    column = (q @ k.mT / WIDTH**0.5).softmax(dim=-1)[IMAGES:, ..., 2].mean(dim=1)
    assert relative_error(control.cross_maps[0][..., 0], column) <= TOLERANCE


def test_only_the_map_stride_is_recorded() -> None:
    control = consistent()
    q, k, v = cross_inputs(2)
    for site in (FINE, OTHERS[0]):
        out = control.cross_attention(q, k, v, site)
        assert torch.equal(out, AttentionControl().cross_attention(q, k, v, site))
    assert control.cross_maps == []


def test_without_concepts_nothing_is_recorded() -> None:
    control = Consistent(token_weights(concepts=0), map_stride=4)
    q, k, v = cross_inputs(4)
    assert torch.equal(control.cross_attention(q, k, v, COARSE), AttentionControl().cross_attention(q, k, v, COARSE))
    assert control.cross_maps == []


def test_one_map_a_layer_in_order() -> None:
    control = consistent()
    q, k, v = cross_inputs(4)
    for i in range(3):
        control.cross_attention((i + 1) * q, k, v, Site("decoder", i, 4))
    assert len(control.cross_maps) == 3
    single = consistent()
    single.cross_attention(2 * q, k, v, COARSE)
    assert torch.equal(control.cross_maps[1], single.cross_maps[0])
    assert consistent().cross_maps == []  # each control has a record of its own


# --- injection and features -------------------------------------------------------------------------------------------


def injection() -> Injection:
    generator = torch.Generator().manual_seed(3)
    anchor = torch.tensor([1, 0, 0, 1])[:, None].expand(IMAGES, PATCHES[2])
    index = torch.randint(PATCHES[2], (IMAGES, PATCHES[2]), generator=generator)
    return Injection(anchor, index, randn(IMAGES, PATCHES[2], seed=4) > 0, 0.8, ANCHORS)


@pytest.mark.parametrize("site", [FINE, OTHERS[0]], ids=lambda site: site.part)
def test_injection_changes_the_conditional_half_only(site: Site) -> None:
    x = randn(2 * IMAGES, PATCHES[2], 5)
    out = consistent(injection=injection()).self_output(x, site)
    assert torch.equal(out[:IMAGES], x[:IMAGES])
    assert torch.equal(out[IMAGES:], injection()(x[IMAGES:]))
    assert not torch.equal(out[IMAGES:], x[IMAGES:])


@pytest.mark.parametrize("site", [COARSE, OTHERS[1], Site("mid", 0, 2)], ids=lambda site: f"{site.part}-{site.stride}")
def test_no_injection_in_the_middle_or_at_another_stride(site: Site) -> None:
    """The middle block takes no part even where its resolution is the finest attended one."""
    x = randn(2 * IMAGES, PATCHES[site.stride], 5)
    assert torch.equal(consistent(injection=injection()).self_output(x, site), x)


def test_without_injection_outputs_stay() -> None:
    x = randn(2 * IMAGES, PATCHES[2], 5)
    assert torch.equal(consistent(sharing()).self_output(x, FINE), x)


def test_dift_is_the_conditional_half_of_the_first_decoder_block() -> None:
    control = consistent()
    assert control.dift is None
    blocks = [randn(2 * IMAGES, 3, 4, 6, seed=i) for i in range(3)]
    for index, features in enumerate(blocks):
        control.decoder_features(features, index)
    assert control.dift is not None
    assert torch.equal(control.dift, blocks[0][IMAGES:])


# --- photos as anchors (App. E) ---------------------------------------------------------------------------------------


def test_aligned_keys_have_the_readers_statistics_and_the_anchors_pattern() -> None:
    keys, to = 3 * randn(2, HEADS, 50, WIDTH, seed=1) + 5, randn(2, HEADS, 40, WIDTH, seed=2) - 1
    aligned = align_keys(keys, to)
    for sample in range(2):
        for head in range(HEADS):
            for channel in range(WIDTH):
                k, t, a = (x[sample, head, :, channel].numpy() for x in (keys, to, aligned))
                expected = (k - k.mean()) / k.std() * t.std() + t.mean()
                torch.testing.assert_close(torch.tensor(a), torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_an_anchor_is_read_with_keys_aligned_to_the_readers(separate: bool) -> None:
    """Each in its own half, with blended queries, of its own region or of all; who reads nobody is not changed."""
    q, k, v = self_inputs(2)
    share = torch.ones(IMAGES, ANCHORS, dtype=torch.bool)
    share[:ANCHORS] = False
    recorder = RecordQueries()
    vanilla = self_inputs(2, seed=5)
    recorder.self_attention(*vanilla, FINE)
    bits = 1 + torch.arange(IMAGES * q.shape[-2], dtype=torch.int32).view(IMAGES, -1) % 3  # regions 1, 2, and both
    regions = {2: (bits, bits[:ANCHORS])} if separate else {}
    sharing = Sharing(key_masks(), share, (recorder, 0.25), regions, align_keys=True)
    out = consistent(sharing).self_attention(q, k, v, FINE)
    q = 0.75 * q + 0.25 * vanilla[0]
    for half in range(2):
        for i in range(IMAGES):
            row = half * IMAGES + i
            for region in (1, 2, 3):
                keys, values, mine = [], [], bits[i] == region
                for j in range(ANCHORS if i >= ANCHORS else 0):
                    anchor, kept = half * IMAGES + j, key_masks()[2][j]
                    if separate:
                        kept = kept & (bits[j] & region != 0)
                    keys.append(align_keys(k[anchor], to=k[row])[:, kept])
                    values.append(v[anchor][:, kept])
                joined = torch.cat([k[row], *keys], dim=1), torch.cat([v[row], *values], dim=1)
                assert relative_error(out[row][:, mine], attend(q[row], *joined)[:, mine]) <= 5e-6
