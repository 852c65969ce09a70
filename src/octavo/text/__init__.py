"""Words to numbers, without torch: prompt weights, chunks, CLIP and T5 vocabularies. `models` turns ids to vectors."""
