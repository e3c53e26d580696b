"""Graph passes: FX graph in, FX graph out. They read neither the model nor the user's configuration.

program            values between stages: DecoderPlan, RiverProgram, Program; Refusal
normalize          one spelling for each operation of a traced graph
dtensor_locals     local shards and collectives in place of DTensors
nodes              queries on nodes of a normalized graph
decoder            find blocks, KV caches and hidden states; fix a dynamic size
segments           split a decoder into segments; fingerprints of equal ones
edits              graph edits that passes share; run a list of passes
experts            matmuls with stacked experts; routers
twins              copies of blocks and head with 4-bit matmuls; AWQ's input scales
backbone           the package's matmuls in 16-bit layers; weights packed without loss
heads              exit scores; draft vocabulary and 16-bit reranking of the 4-bit head
capture_safety     operations and inputs that a captured graph cannot have
freeze             RiverProgram -> Program, without fx nodes
fusion.match       matmuls by role, writes to KV caches, columns of a result
fusion.recognise   norms, activations, rotary embeddings, attention
fusion.cache_rules fused KV cache writes and attention
fusion.rules       fused norms, residuals, MLPs, heads and exit scores
"""
