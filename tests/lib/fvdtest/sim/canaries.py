# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: changes of the engine's source that the simulator must catch.

Each stands for a way in which a storage engine loses data; B1 to B8 are defects that the first FVD
really had. A change is a text that stands exactly once in a module, and what replaces it, so that a
canary that no longer fits the source fails loudly instead of proving nothing. What the simulator
would have to look for too long, since three must meet in one moment or a disk be vast, has a test
of its own, which must fail.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Canary:
    """One planted bug, and where it is looked for."""

    name: str
    module: str
    old: str
    new: str
    scenario: str = "mixed"
    first: int = 1000  # seed
    test: str = ""  # that has to fail, below tests/, where the simulator is not asked


CANARIES = (
    Canary("flush_does_nothing", "commit",
           "        rc = storage_flush(s)\n", "        rc = 0\n"),
    Canary("b1_metadata_before_data", "commit",
           "    if not together:\n        rc = commit_flush_data(c, n)\n",
           "    if not together:\n        rc = 0\n"),
    Canary("b1_checkpoint_before_data", "commit",
           "    rc = commit_flush_data(c, n)\n    if rc == 0 and c.table != NULL:\n",
           "    rc = 0\n    if rc == 0 and c.table != NULL:\n"),
    Canary("b2_failed_open_marks_clean", "image",
           "    if rc < 0:\n        image_free(m)\n    return rc\n\n\ncdef int image_close",
           "    if rc < 0:\n        if m.header.fields.magic:\n"
           "            header_store_clean(&m.header, m.file, True)\n"
           "            storage_flush(m.file)\n"
           "        image_free(m)\n    return rc\n\n\ncdef int image_close", "faults"),
    Canary("b3_bitmap_before_table", "commit",
           "        rc = write_pages(c, &c.table_copies, c.header.fields.table_offset, n)\n"
           "    if rc == 0 and c.bitmap != NULL:\n"
           "        rc = write_pages(c, &c.bitmap_copies, c.header.fields.bitmap_offset, n)\n",
           "        if c.bitmap != NULL:\n"
           "            rc = write_pages(c, &c.bitmap_copies, c.header.fields.bitmap_offset, n)\n"
           "        if rc == 0:\n"
           "            rc = write_pages(c, &c.table_copies, c.header.fields.table_offset, n)\n",
           "compact"),
    Canary("b4_bit_without_its_mapping", "changes",
           "            if journal_put_mapped(c.journal, at // SECTOR, "
           "(stop - at) // SECTOR, chunk,\n"
           "                                  entry_to_record(c, chunk)) < 0:\n",
           "            entry_to_record(c, chunk)\n"
           "            if journal_put_blocks(c.journal, at // SECTOR, "
           "(stop - at) // SECTOR) < 0:\n",
           "compact"),
    Canary("b5_finish_with_a_block_absent", "pipeline",
           "            if waiting or bitmap_next_clear(&m.bitmap, 0, m.bitmap.blocks) "
           "< m.bitmap.blocks:\n",
           "            if False:\n", "prefetch"),
    Canary("b5_flag_before_the_bits", "image",
           "        rc = commit_checkpoint(&m.commit, n)\n    if rc < 0:\n        return rc\n"
           "    rc = header_store_prefetched",
           "        rc = 0\n    if rc < 0:\n        return rc\n"
           "    rc = header_store_prefetched", "prefetch"),
    Canary("b6_partly_copied_block", "copy_on_read",
           "        end = (offset + length) // bs\n",
           "        end = (offset + length + bs - 1) // bs\n"),
    Canary("b7_clean_before_all_else", "image",
           "    rc = commit_flush(&m.commit, n)\n    if rc == 0 and (m.compact",
           "    header_store_clean(&m.header, m.file, True)\n"
           "    rc = commit_flush(&m.commit, n)\n    if rc == 0 and (m.compact"),
    Canary("b8_locks_do_not_exclude", "range_lock",
           "        if r.first[i] < end and first < r.end[i]:\n            return True\n",
           "        if r.first[i] < end and first < r.end[i]:\n            return False\n"),
    Canary("bit_before_the_data", "write_path",
           "    rc = data_store(m, data - head,",
           "    if over_base:\n        image_set_local(m, first, last + 1, False)\n"
           "    rc = data_store(m, data - head,"),
    Canary("mapping_before_the_data", "data_area",
           "    begin = m.data_offset + first * m.chunk_size\n    address = begin + within\n",
           "    begin = m.data_offset + first * m.chunk_size\n    address = begin + within\n"
           "    for i in range(count_):\n"
           "        table_set(&m.table, chunk + i, <uint32_t>(first + i), reused)\n", "compact"),
    Canary("mapping_never_recorded", "changes",
           "                if not c.overflow and journal_put_entry(",
           "                if chunk % 4 != 3 and not c.overflow and journal_put_entry(",
           "compact"),
    Canary("ring_reused_too_early", "commit",
           "    cdef int rc = copied\n    if rc == 0:\n        rc = checkpoint_steps",
           "    cdef int rc = copied\n    store_release(&c.journal.tail, head)\n"
           "    if rc == 0:\n        rc = checkpoint_steps", "journal"),
    Canary("epoch_before_the_pages", "commit",
           "    rc = commit_flush_data(c, n)\n    if rc == 0 and c.table != NULL:\n",
           "    header_store_epoch(c.header, c.storage, epoch)\n"
           "    rc = commit_flush_data(c, n)\n    if rc == 0 and c.table != NULL:\n"),
    Canary("takeover_without_fsync", "image",
           "        rc = storage_flush(m.file)\n        if rc == 0 and m.data != m.file:\n"
           "            rc = storage_flush(m.data)\n",
           "        rc = 0\n"),
    Canary("takeover_ignores_live_bits", "image",
           "    if not o.takeover:\n        memcpy(m.bitmap.present",
           "    if True:\n        memcpy(m.bitmap.present"),
    Canary("fua_joins_an_older_commit", "commit",
           "    need = c.started + 1\n",
           "    need = c.started + (0 if c.leading else 1)\n"),
    Canary("failed_flush_is_forgotten", "commit",
           "        if rc < 0:\n            commit_set_fault(c, rc)\n        elif s == c.data:\n",
           "        if s == c.data:\n", "faults"),
    Canary("fault_ignored_by_writes", "write_path",
           "    if commit_fault(&m.commit):\n        return -EIO\n    if fua and",
           "    if fua and", "faults"),
    Canary("place_reused_while_in_use", "places",
           "                and quiescent(p.quiescence, p.retired[at].stamp)):\n",
           "                and (quiescent(p.quiescence, p.retired[at].stamp) or True)):\n",
           "reuse"),
    Canary("place_reused_before_checkpoint", "places",
           "        if (p.retired[at].checkpoint <= checkpoint\n",
           "        if (p.retired[at].checkpoint <= checkpoint + 1\n", "reuse"),
    Canary("place_reused_without_zeroing", "data_area",
           "        if reused:\n            rc = zero_rest(",
           "        if reused and False:\n            rc = zero_rest(", "compact"),
    Canary("one_flush_for_reused_places", "commit",
           "reused == c.reused_before\n", "reused + 1 > 0\n", "compact"),
    Canary("zero_bit_without_zeroing", "data_area",
           "        if data == NULL:\n            return storage_zero(m.data, run[0], address,",
           "        if data == NULL:\n            return 0 * storage_zero(m.data, 0, address,",
           "raw"),
    Canary("copy_lands_on_newer_data", "copy_on_read",
           "        at = bitmap_next_clear(&m.bitmap, at, end)\n        if at == end:\n"
           "            break\n        stop = bitmap_run_end(&m.bitmap, at, end)\n",
           "        stop = end\n", "prefetch"),
    Canary("run_sought_from_its_first_block", "bitmap",
           "    return next_bit(b.present, 0, block + 1, end)\n",
           "    return next_bit(b.present, 0, block, end)\n", "prefetch", 1050),
    Canary("read_before_its_own_begin", "read_path",
           "    edge = min(bitmap_run_end(&m.bitmap, block, end_block) * m.block_size,",
           "    edge = min((block if bitmap_test(&m.bitmap, block) else\n"
           "        bitmap_run_end(&m.bitmap, block, end_block)) * m.block_size,", "journal", 1455),
    Canary("entry_behind_its_marks", "chunk_table",
           "    store_release32(t.present + chunk, entry)\n    if (old ^ entry) & ~CLOSED:\n"
           "        mark(t.stale_pages, chunk // PAGE_ENTRIES)\n"
           "        mark(t.dirty, chunk)\n        mark(t.dirty_groups, chunk >> 6)\n",
           "    if (old ^ entry) & ~CLOSED:\n"
           "        mark(t.stale_pages, chunk // PAGE_ENTRIES)\n"
           "        mark(t.dirty, chunk)\n        mark(t.dirty_groups, chunk >> 6)\n"
           "    store_release32(t.present + chunk, entry)\n"
           "    if (old ^ entry) & ~CLOSED:\n", "compact", 2375),
    Canary("entry_told_once_in_a_batch", "journal",
           "        memcpy(sector + j.table_at + TABLE_BYTES + 4 * (chunk - j.table_first), "
           "&entry, 4)\n", "        pass\n",
           test="unit/fvdcore/test_journal.py::"
                "test_an_entry_that_is_put_again_has_its_last_value"),
    Canary("tail_of_a_block_not_filled", "write_path",
           "            tail = block_end - end\n", "            tail = 0\n"),
    Canary("marks_cleared_after_the_look", "changes",
           "            words = exchange_acq_rel(b.dirty_words + group, 0)\n",
           "            words = load_relaxed(b.dirty_words + group) & ~<uint64_t>1\n"),
    Canary("nobody_is_woken", "range_lock",
           "    if r.waiting or r.patient:\n        cond_broadcast(&r.released)\n", ""),
    Canary("moved_chunk_taken_for_a_fresh_one", "resize",
           "<uint32_t>target | CLOSED, True)\n", "<uint32_t>target | CLOSED, reused)\n",
           "grow", 1226),
    Canary("moved_chunk_open_before_it_is_durable", "resize",
           "    rc = commit_flush(&m.commit, n)\n    table_set(", "    table_set(",
           test="unit/fvdcore/test_resize.py::"
                "test_a_moved_chunk_is_durable_before_a_block_of_it_gets_there"),
    Canary("table_grows_before_its_entries", "resize",
           "        rc = fill_table(m, old, bytes)\n", "        rc = 0\n", "grow"),
    Canary("padding_of_the_table_is_trusted", "resize",
           "    table_mark_stale(&m.table, m.table.chunks, end)\n"
           "    return commit_checkpoint(&m.commit, n)\n", "    return 0\n", "grow", 1003),
    Canary("size_before_its_zeros", "resize",
           "    if rc == 0:\n        rc = commit_flush_data(&m.commit, n)\n    if rc == 0:\n"
           "        rc = header_store_disk_size",
           "    if rc == 0:\n        rc = header_store_disk_size", "grow"),
    Canary("update_not_staged", "settings",
           "    if header_must_stage(&m.header, values, count_):\n", "    if False:\n", "grow"),
    Canary("space_taken_where_data_lie", "places",
           "        storage_zero(p.data, grown, old, ZERO_KEEP | ZERO_HINT)\n",
           "        storage_zero(p.data, grown, old - grown, ZERO_KEEP | ZERO_HINT)\n", "compact"),
    Canary("space_ahead_is_kept", "image",
           "    if rc == 0 and cut_storage(m) == 0 and m.data != m.file:\n",
           "    if rc == 0 and m.data != m.file:\n", "compact"),
    Canary("a_late_answer_finds_nobody", "patience",
           "        if job.state != JOB_COPYING and (p.interrupted",
           "        if (p.interrupted", "faults"),
    Canary("who_waits_for_a_reader_is_forgotten", "patience",
           "    h.job = NULL\n    cond_signal(&job.done)\n", "    h.job = NULL\n", "faults"),
    Canary("table_copied_before_the_bitmap", "commit",
           "    if c.bitmap != NULL:\n"
           "        rc = copies_take_bitmap(&c.bitmap_copies, c.bitmap)\n"
           "    if rc == 0 and c.table != NULL:\n"
           "        rc = copies_take_table(&c.table_copies, c.table)\n",
           "    if c.table != NULL:\n"
           "        rc = copies_take_table(&c.table_copies, c.table)\n"
           "    if rc == 0 and c.bitmap != NULL:\n"
           "        rc = copies_take_bitmap(&c.bitmap_copies, c.bitmap)\n", "compact"),
    Canary("takeover_saves_no_replayed_bits", "image",
           "    if found and m.has_bitmap:\n",
           "    if found and m.has_bitmap and not o.takeover:\n"),
    Canary("takeover_saves_no_replayed_entries", "image",
           "            m.table.stale_pages[w] |= disk.stale_pages[w]\n",
           "            pass\n", "compact"),
    Canary("failed_neighbourhood_is_copied", "execute",
           "        begin = r.offset\n        end = r.offset + r.length\n"
           "        rc = image_read(m, r.data, r.length, r.offset, flags, n)\n    if rc == 0:\n",
           "        rc = image_read(m, r.data, r.length, r.offset, flags, n)\n    if rc == 0:\n",
           "faults", 1085),
    Canary("file_not_cut_at_open", "image",
           "    return cut_storage(m) if rc == 0 else rc\n", "    return rc\n", "compact"),
    Canary("wrapped_batch_begins_again", "journal",
           "        rc = storage_write(j.storage, j.batch + done * PAGE, run * PAGE, ",
           "        rc = storage_write(j.storage, j.batch, run * PAGE, ",
           test="unit/fvdcore/test_journal.py::"
                "test_a_batch_over_the_end_of_the_ring_is_written_in_two_parts"),
    Canary("owner_of_a_part_owns_the_unit", "owners",
           "        whole = (run + o.unit - 1) >> o.shift if offset + run == end else "
           "run >> o.shift\n", "        whole = (run + o.unit - 1) >> o.shift\n",
           test="unit/fvdcore/test_owners.py::"
                "test_a_unit_of_which_a_layer_owns_a_part_is_not_taken_for_its"),
    Canary("first_page_is_stale_for_all", "bitmap",
           "                <uint64_t>1 << (w // PAGE_WORDS & 63))\n            fetch_or_release("
           "b.dirty_words", "                1)\n            fetch_or_release(b.dirty_words",
           test="unit/fvdcore/test_commit.py::"
                "test_a_checkpoint_writes_only_pages_that_changed"),
    Canary("narrow_lock_is_kept", "write_path",
           "    if mapped and not data_all_mapped(m, length, offset):\n", "    if False:\n",
           test="unit/fvdcore/test_data_area.py::"
                "test_a_chunk_that_lost_its_place_before_a_write_had_its_lock_is_locked_whole"),
    Canary("cut_length_stays_durable", "image",
           "    m.commit.durable_length = min(m.commit.durable_length, end)\n", "",
           test="unit/fvdcore/test_data_area.py::"
                "test_storage_that_was_cut_is_not_durably_there_when_it_grows_again"),
    Canary("reused_counted_too_late", "commit",
           "        c.reused_before = reused_before\n", "        c.reused_before = reused\n",
           test="unit/fvdcore/test_data_area.py::"
                "test_a_place_used_again_beside_a_commit_costs_the_next_one_two_flushes"),
    Canary("recorded_though_changed_again", "chunk_table",
           "    if (not (load_acquire(t.dirty + (chunk >> 6)) >> (chunk & 63)) & 1\n"
           "            and (now", "    if (True\n            and (now",
           test="unit/fvdcore/test_chunk_table.py::"
                "test_an_entry_that_changed_and_changed_back_stays_loose"),
    Canary("finish_waits_for_no_lock", "image", "    range_locks_wait_idle(&m.locks)\n", "",
           test="unit/fvdcore/test_image.py::"
                "test_finishing_waits_for_locks_and_frees_from_the_base"),
)  # fmt: skip
