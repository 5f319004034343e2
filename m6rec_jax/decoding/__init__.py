"""From histories to real items, from prompts to text: trie, prefix, beams, sampler, engine, batch generation."""
