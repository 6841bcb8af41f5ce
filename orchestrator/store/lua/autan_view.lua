-- autan_view: what the core decides on, in one consistent picture.
-- ARGV  queue_limit (at most 1000)
-- Reply OK, now_ms, queued_total,
--       k, k x (id, epoch, prompt_tokens, max_tokens, n, prio, submitted_ms, deadline_ms, tenant, model, attempts),
--       m, m x (inst, role, addr, incarnation, state, beat_ms, want_drain,
--               p_requests, p_tokens, p_blocks, d_requests, d_blocks, m_in, m_out (moves that are open), card, stats)
-- Promise: reads only. Requests come in queue order (class, then submission), instances by name.
-- p_tokens counts prompt and journaled tokens that are assigned as prefill and not handed over.
local QUEUE_FIELDS = {'epoch', 'prompt_tokens', 'max_tokens', 'prio', 'submitted_ms', 'deadline_ms', 'tenant', 'model', 'attempts'}
local INSTANCE_FIELDS = {
  'role', 'addr', 'incarnation', 'state', 'beat_ms', 'want_drain',
  'p_requests', 'p_tokens', 'p_blocks', 'd_requests', 'd_blocks', 'm_in', 'm_out', 'card', 'stats',
}

local function autan_view(keys, args)
  local c = open('autan_view', keys, args)
  local limit = take_int(c, 'queue_limit', 0, 1000)
  taken_all(c)
  local ids = limit > 0 and redis.call('ZRANGE', k(c, 'ready'), 0, limit - 1) or {}
  local reply = {'OK', text(c.now), redis.call('ZCARD', k(c, 'ready')), #ids}
  for _, id in ipairs(ids) do
    local r = redis.call('HMGET', k_request(c, id), unpack(QUEUE_FIELDS))
    reply[#reply + 1] = id
    for at = 1, #QUEUE_FIELDS do
      if at == 4 then reply[#reply + 1] = journal_length(c, id) end
      reply[#reply + 1] = r[at]
    end
  end
  local instances = redis.call('SMEMBERS', k(c, 'instances'))
  table.sort(instances)
  reply[#reply + 1] = #instances
  for _, instance in ipairs(instances) do
    local i = redis.call('HMGET', k_instance(c, instance), unpack(INSTANCE_FIELDS))
    reply[#reply + 1] = instance
    for at = 1, #INSTANCE_FIELDS do reply[#reply + 1] = i[at] or '0' end
  end
  return reply
end
redis.register_function{function_name = 'autan_view', callback = autan_view, flags = {'no-writes'}}
