-- autan_requests: the live requests, oldest first.
-- ARGV  limit (at most 1000)
-- Reply OK, now_ms, k, k x (id, tenant, state, epoch, prompt_tokens, n, p, d, submitted_ms, attempts,
--       max_tokens, deadline_ms, next_epoch)
-- Promise: reads only.
local function autan_requests(keys, args)
  local c = open('autan_requests', keys, args)
  local limit = take_int(c, 'limit', 0, 1000)
  taken_all(c)
  local ids = limit > 0 and redis.call('ZRANGE', k(c, 'live'), 0, limit - 1) or {}
  local reply = {'OK', text(c.now), #ids}
  for _, id in ipairs(ids) do
    local r = load_request(c, id)
    for _, value in ipairs({
      id, r.tenant, r.state, r.epoch, r.prompt_tokens, journal_length(c, id), r.p, r.d, r.submitted_ms, r.attempts,
      r.max_tokens, r.deadline_ms, next_epoch(r),
    }) do
      reply[#reply + 1] = value
    end
  end
  return reply
end
redis.register_function{function_name = 'autan_requests', callback = autan_requests, flags = {'no-writes'}}
